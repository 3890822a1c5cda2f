"""Poisson flow generative models: fast, correct and easy to use.

The operations are :func:`posterior_mean`, :func:`field_fn` and :func:`log_density`; the flow that
trains and samples is :class:`PoissonFlow`; :func:`load` reads what was trained.
"""

from . import backends, data, metrics, networks, plotting, solvers, training
from .backends import use_backend
from .checkpoint import load, save
from .checks import debug_checks
from .flow import PoissonFlow
from .functional import field_fn, log_density, posterior_mean

__all__ = [
    "PoissonFlow",
    "backends",
    "data",
    "debug_checks",
    "field_fn",
    "load",
    "log_density",
    "metrics",
    "networks",
    "plotting",
    "posterior_mean",
    "save",
    "solvers",
    "training",
    "use_backend",
]
