"""Training: the trainer, its configuration, checkpoints, and runs of the command line."""

from .trainer import Diverged, FolderInUse, ProcessLost, Terminated, TrainConfig, Trainer

__all__ = ["Diverged", "FolderInUse", "ProcessLost", "Terminated", "TrainConfig", "Trainer"]
