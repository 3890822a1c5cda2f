"""Flows between a prior and data: PFGM, PFGM++ and what they share."""

from .conditions import Condition, Network
from .flow import Flow
from .plusplus import PoissonFlowPP
from .poisson import PoissonFlow

__all__ = ["Condition", "Flow", "Network", "PoissonFlow", "PoissonFlowPP"]
