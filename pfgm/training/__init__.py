"""Training: the trainer, its configuration, checkpoints, and runs of the command line."""

from .config import TrainConfig
from .locks import FolderInUse
from .processes import ProcessLost
from .signals import Terminated
from .trainer import Diverged, Trainer

__all__ = ["Diverged", "FolderInUse", "ProcessLost", "Terminated", "TrainConfig", "Trainer"]
