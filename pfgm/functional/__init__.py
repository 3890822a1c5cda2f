"""The operations as public functions: posterior mean, field, log density and steps of the ODE."""

from .field import field_fn, log_density, posterior_mean
from .steps import Field, euler_step, heun_step, multistep_step

__all__ = [
    "Field",
    "euler_step",
    "field_fn",
    "heun_step",
    "log_density",
    "multistep_step",
    "posterior_mean",
]
