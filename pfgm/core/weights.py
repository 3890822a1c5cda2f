"""Weights relative to that of the nearest reference, the log-sum-exp, and the limits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.checks import checks_values


def log_weight(excess: Tensor, nearest: Tensor, radius: Tensor, D: float, N: int) -> Tensor:
    """Log of the weight at the squared distance nearest + excess, relative to that at nearest."""
    if math.isinf(D):
        scores = -excess / radius / radius / 2
    else:
        scores = torch.log1p(excess / (nearest + radius.square())) * (-(N + D) / 2)
    return torch.where(excess == 0, 0.0, scores)


def log_sum_exp(nearest: Tensor, total: Tensor, radius: Tensor, D: float, N: int) -> Tensor:
    """Log-sum-exp of all scores, from the nearest squared distance and the total weight."""
    if math.isinf(D):
        score = torch.where(nearest == 0, 0.0, -nearest / radius / radius / 2)
    else:
        # r² may underflow. The score is +inf on a reference at r = 0.
        squared = (nearest + radius.square()).log()
        score = torch.where(nearest == 0, 2 * radius.log(), squared) * (-(N + D) / 2)
    return torch.where(score.isposinf(), score, score + total.log())


def at_limit(nearest: Tensor, radius: Tensor, D: float) -> Tensor:
    """Where the mean is locally constant.

    This is so on a reference at r = 0. At D = ∞ it is so at σ = 0, and where σ is so small that
    scores overflow.
    """
    if math.isinf(D):
        return (radius == 0) | (nearest / radius / radius).isinf()
    return nearest + radius.square() == 0


def is_flat(nearest: Tensor, radius: Tensor, D: float, N: int) -> Tensor:
    """Where the mean does not change with x and r, as far as float64 tells.

    This is so at a limit, and on a reference where r is so small that (N + D)/r² overflows. The
    gradient of the log-sum-exp would be 0 · ∞.
    """
    largest = torch.finfo(nearest.dtype).max / 1e4
    overflows = radius.square() * largest < (1 if math.isinf(D) else N + D)
    return at_limit(nearest, radius, D) | ((nearest == 0) & overflows)


def check_singular(flat: Tensor, grad_logsumexp: Tensor) -> None:
    """Raises ValueError if the log-sum-exp has a gradient in a row whose mean is constant."""
    if checks_values(flat.device) and bool((bad := flat & (grad_logsumexp != 0)).any()):
        raise ValueError(singular_message(int(bad.flatten().nonzero()[0])))


def singular_message(row: int) -> str:
    return (
        f"return_logsumexp: in row {row} of x the gradient of the log-sum-exp overflows float64, "
        "or does not exist because r or sigma is 0; use a larger r or sigma."
    )
