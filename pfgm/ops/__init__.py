"""The operators of torch.library: schema, shapes, gradients and transforms, for all backends.

Samples are rows (B, N), and every level is given in float64; :mod:`pfgm.functional` prepares them.
"""

from . import normalised_field, ode_step, posterior_mean

__all__ = ["normalised_field", "ode_step", "posterior_mean"]
