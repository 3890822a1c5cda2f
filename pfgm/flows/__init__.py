"""Flows between a prior and data: PFGM, PFGM++ and what they share."""

from .flow import Flow
from .plusplus import PoissonFlowPP
from .poisson import PoissonFlow

__all__ = ["Flow", "PoissonFlow", "PoissonFlowPP"]
