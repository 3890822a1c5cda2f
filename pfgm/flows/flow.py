"""The class that joins what all flows can do."""

from __future__ import annotations

from .editing import Editing
from .fitting import Fitting
from .inpainting import Inpainting
from .likelihood import Likelihood


class Flow(Fitting, Likelihood, Editing, Inpainting):
    """Base of :class:`pfgm.PoissonFlow` and :class:`pfgm.PoissonFlowPP`.

    A flow carries a prior at its first level to data at its last level along the ODE
    dx/dσ = (x − mean(x, σ))/σ. Its methods are in classes by subject: parametrisation, sampling,
    training targets, fitted levels, likelihood, editing and inpainting.
    """
