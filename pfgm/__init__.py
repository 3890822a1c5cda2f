"""Poisson flow generative models: fast, correct and easy to use.

The operations are :func:`posterior_mean`, :func:`field_fn`, :func:`log_density` and the steps of
the ODE, :func:`euler_step`, :func:`heun_step` and :func:`multistep_step`; the flows that train and
sample are :class:`PoissonFlow` and :class:`PoissonFlowPP`; :func:`load` reads what was trained, or
comes with the package, and :func:`save` writes it.
"""

import importlib
from importlib.util import find_spec
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# In a checkout Python finds these sources first; an installed package has what is compiled.
if find_spec(f"{__name__}.kernels") is None:
    __path__ = extend_path(__path__, __name__)

from . import backends, data, solvers
from .backends import use_backend
from .common.values import debug_checks
from .flows.flow import Flow
from .flows.interpolation import interpolate
from .flows.likelihood import LogLikelihood
from .flows.plusplus import PoissonFlowPP
from .flows.poisson import PoissonFlow
from .functional import (
    Field,
    euler_step,
    field_fn,
    heun_step,
    log_density,
    multistep_step,
    posterior_mean,
)
from .integrations.k_diffusion import as_k_diffusion
from .references import ReferenceSet

if TYPE_CHECKING:
    from . import (
        distillation,
        evaluation,
        metrics,
        networks,
        plotting,
        pretrained,
        training,
    )
    from .training.model_files import from_pretrained, load, save, save_pretrained
else:
    _FUNCTIONS = ("from_pretrained", "load", "save", "save_pretrained")

    def __getattr__(name: str) -> Any:
        """What the operations and flows do not need is imported when it is asked for."""
        if name in _FUNCTIONS:
            return getattr(importlib.import_module(f"{__name__}.training.model_files"), name)
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.3.0"

__all__ = [
    "Field",
    "Flow",
    "LogLikelihood",
    "PoissonFlow",
    "PoissonFlowPP",
    "ReferenceSet",
    "as_k_diffusion",
    "backends",
    "data",
    "debug_checks",
    "distillation",
    "euler_step",
    "evaluation",
    "field_fn",
    "from_pretrained",
    "heun_step",
    "interpolate",
    "load",
    "log_density",
    "metrics",
    "multistep_step",
    "networks",
    "plotting",
    "posterior_mean",
    "pretrained",
    "save",
    "save_pretrained",
    "solvers",
    "training",
    "use_backend",
]
