"""The operations as public functions: posterior mean, field, log density and steps of the ODE."""

from .field import field_fn, log_density, posterior_mean
from .ode_step import (
    euler_step,
    euler_step_from_mean,
    heun_step,
    heun_step_from_mean,
    multistep_step,
    multistep_step_from_mean,
)
from .steps import Field

__all__ = [
    "Field",
    "euler_step",
    "euler_step_from_mean",
    "field_fn",
    "heun_step",
    "heun_step_from_mean",
    "log_density",
    "multistep_step",
    "multistep_step_from_mean",
    "posterior_mean",
]
