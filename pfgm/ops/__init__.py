"""The operators of torch.library, the same for all backends: schema, shapes, gradients, transforms.

Samples are rows (B, N), and levels are float64. :mod:`pfgm.functional` brings arguments into this
form.
"""

from . import (
    native_gradients,
    normalised_field,
    ode_step,
    posterior_mean,
    posterior_mean_parts,
)

__all__ = [
    "native_gradients",
    "normalised_field",
    "ode_step",
    "posterior_mean",
    "posterior_mean_parts",
]
