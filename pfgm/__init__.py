"""Poisson flow generative models: fast, correct and easy to use.

The operations are :func:`posterior_mean`, :func:`field_fn` and :func:`log_density`; the flow that
trains and samples is :class:`PoissonFlow`.
"""

from .backends import use_backend
from .checks import debug_checks
from .flow import PoissonFlow
from .functional import field_fn, log_density, posterior_mean

__all__ = [
    "PoissonFlow",
    "debug_checks",
    "field_fn",
    "log_density",
    "posterior_mean",
    "use_backend",
]
