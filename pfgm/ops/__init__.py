"""The operations as torch sees them: schema, shapes and gradients, for all backends alike.

Arguments are flat and complete; :mod:`pfgm.functional` makes them so.
"""

from . import normalised_field, ode_step, posterior_mean

__all__ = ["normalised_field", "ode_step", "posterior_mean"]
