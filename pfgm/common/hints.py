"""Hints for arguments that go by other names here than elsewhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_INSTEAD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("num_steps", "n_steps", "max_steps", "num_inference_steps", "T", "iterations"),
            "integration_steps",
            *("epochs", "num_epochs", "num_train_epochs", "max_train_steps", "total_steps"),
        ),
        ("steps", "config=TrainConfig(steps=…)"),
    ),
    **dict.fromkeys(
        ("batch", "bs", "minibatch", "train_batch_size", "eval_batch_size"), ("batch_size",)
    ),
    **dict.fromkeys(("num_samples", "n_samples", "num_gen", "num_images"), ("n",)),
    "batch_size": ("n", "config=TrainConfig(batch_size=…)"),
    "lr": ("learning_rate", "config=TrainConfig(learning_rate=…)"),
    "steps": ("config=TrainConfig(steps=…)",),
    "learning_rate": ("config=TrainConfig(learning_rate=…)",),
    **dict.fromkeys(("ema_decay", "ema_rate", "ema_max_decay"), ("ema",)),
    **dict.fromkeys(("warmup_steps", "lr_warmup_steps"), ("warmup",)),
    **dict.fromkeys(("image_size", "resolution"), ("resize",)),
    **dict.fromkeys(("train_data_dir", "dataset_name", "dataset"), ("data",)),
    **dict.fromkeys(("output_dir", "savedir", "outdir"), ("out",)),
    **dict.fromkeys(("num_channel", "num_channels", "dim"), ("width",)),
    **dict.fromkeys(
        ("checkpointing_steps", "save_step", "save_model_epochs"), ("checkpoint_every",)
    ),
    "gradient_accumulation_steps": ("accumulate",),
    **dict.fromkeys(("mixed_precision", "precision"), ("precision", "compute")),
    "save_images_epochs": ("evaluate_every",),
    "lr_scheduler": ("decay",),
    "adam_beta2": ("beta2",),
    **dict.fromkeys(("report_to", "logger"), ("log",)),
    **dict.fromkeys(("sampler", "integration_method"), ("solver",)),
    "random_flip": ("flips",),
    "references": ("reference_batch",),
    "levels": ("student_levels",),
    "resume_from_checkpoint": ("resume_from",),
    **dict.fromkeys(("grad_clip", "max_grad_norm"), ("clip",)),
    **dict.fromkeys(("guidance_scale", "cfg_scale", "cfg"), ("guidance",)),
    "seed": ("generator=torch.Generator().manual_seed(seed)",),
    **dict.fromkeys(
        ("label", "labels", "class_labels", "class", "class_idx"),
        ("condition={'labels': labels}", "label", "labels"),
    ),
}
"""What to give in place of a name: the first of these that a function takes."""


def instead_of(name: str, known: Container[str]) -> str | None:
    """What to give in place of an argument that is not among the known ones, if that is known.

    >>> instead_of("lr", ["steps", "learning_rate"]), instead_of("lr", ["steps"])
    ('learning_rate', None)
    """
    if name in known:
        return None
    return next((each for each in _INSTEAD.get(name, ()) if each.partition("=")[0] in known), None)


def hint(name: str, known: Container[str]) -> str:
    """The hint at the end of an error, "; use …", or an empty text."""
    instead = instead_of(name, known)
    return "" if instead is None else f"; use {instead}"


def with_hints(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose TypeError for an unknown argument says what to give instead.

    >>> @with_hints
    ... def train(*, learning_rate): ...
    >>> train(lr=1e-3)
    Traceback (most recent call last):
    TypeError: train() got an unexpected keyword argument 'lr'; use learning_rate
    """
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*arguments: P.args, **named: P.kwargs) -> T:
        for name in named:
            if instead := hint(name, parameters):
                raise TypeError(
                    f"{function.__qualname__}() got an unexpected keyword argument "
                    f"{name!r}{instead}"
                )
        return function(*arguments, **named)

    return checked
