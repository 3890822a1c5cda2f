"""Training: the trainer, its configuration, checkpoints, and runs of the command line."""

from .checks import Diverged
from .config import TrainConfig
from .locks import FolderInUse
from .processes import ProcessLost
from .signals import Terminated
from .trainer import Trainer

__all__ = ["Diverged", "FolderInUse", "ProcessLost", "Terminated", "TrainConfig", "Trainer"]
