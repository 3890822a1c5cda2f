"""Weights relative to that of the nearest reference, the log-sum-exp, and the limits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..common.numbers import LARGEST
from ..common.values import checks_values


class Law(ABC):
    """How a score depends on the squared distance d² of a reference.

    A score is −(N + D)/2 · log(d² + r²), or −d²/(2σ²) at D = ∞, where the radius is σ. Distances
    and radii are tensors that broadcast. The nearest is at d² = ``nearest``; an excess is by how
    much others exceed it.
    """

    adds_radius: bool
    """Whether scores depend on d² + r² alone, so that the gradient in r is r times a sum over the
    references."""

    @abstractmethod
    def score(self, squared: Tensor, radius: Tensor) -> Tensor:
        """The score at a squared distance."""

    @abstractmethod
    def relative_score(self, excess: Tensor, nearest: Tensor, radius: Tensor) -> Tensor:
        """The score at an excess less that at the nearest, without cancellation."""

    @abstractmethod
    def affected(
        self, error: Tensor, allowed: float, drop: float, nearest: Tensor, radius: Tensor
    ) -> Tensor:
        """The excess up to which an error of d² changes a score by more than ``allowed``, among
        scores that are at most ``drop`` below that of the nearest; 0 or less if there is none."""

    @abstractmethod
    def variance(self, squared: Tensor, radius: Tensor) -> Tensor:
        """The inverse of the score's sensitivity, −½ over its derivative in d²."""

    @abstractmethod
    def ratio(self, excess: Tensor, nearest: Tensor, radius: Tensor) -> Tensor:
        """The excess over d² + r², or over σ²."""

    @abstractmethod
    def pull(self, factor: Tensor, squared: Tensor, radius: Tensor) -> Tensor:
        """A factor times (N + D)/(d² + r²), or over σ²."""

    @abstractmethod
    def change(self, half: Tensor, moved: Tensor, squared: Tensor, radius: Tensor) -> Tensor:
        """The tangent of the score where d² moves by 2 ``half`` and the radius by ``moved``."""

    @abstractmethod
    def totals(
        self, g: Tensor, moment: Tensor, nearest: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Σ c_j and the gradient of the radius, from Σ p t = g and the moment Σ p t · ratio."""

    @abstractmethod
    def is_limit(self, nearest: Tensor, radius: Tensor) -> Tensor:
        """Where the mean is locally constant.

        This is so on a reference at r = 0. At D = ∞ it is so at σ = 0, and where σ is so small that
        scores overflow.
        """

    @abstractmethod
    def _per_square(self) -> float:
        """The factor of 1/r² in the score's sensitivity on a reference."""

    def log_weight(self, excess: Tensor, nearest: Tensor, radius: Tensor) -> Tensor:
        """Log of the weight at an excess, relative to that at the nearest."""
        return self.relative_score(excess, nearest, radius).masked_fill_(excess == 0, 0.0)

    def log_sum_exp(self, nearest: Tensor, total: Tensor, radius: Tensor) -> Tensor:
        """Log-sum-exp of all scores, from the nearest squared distance and the total weight."""
        score = self.score(nearest, radius)
        return torch.where(score.isposinf(), score, score + total.log())

    def is_constant(self, nearest: Tensor, radius: Tensor) -> Tensor:
        """Where the mean does not change with x and r, as far as float64 tells.

        This is so at a limit, and on a reference where r is so small that (N + D)/r² overflows. The
        gradient of the log-sum-exp would be 0 · ∞.
        """
        largest = torch.finfo(nearest.dtype).max / 1e4
        overflows = radius.square() * largest < self._per_square()
        return self.is_limit(nearest, radius) | ((nearest == 0) & overflows)


class _Power(Law):
    """−(N + D)/2 · log(d² + r²)."""

    adds_radius = True

    def __init__(self, power: float) -> None:
        self.power = power  # N + D

    def score(self, squared: Tensor, radius: Tensor) -> Tensor:
        # r² may underflow. The score is +inf on a reference at r = 0.
        logarithm = (squared + radius.square()).log()
        return torch.where(squared == 0, 2 * radius.log(), logarithm) * (-self.power / 2)

    def relative_score(self, excess: Tensor, nearest: Tensor, radius: Tensor) -> Tensor:
        return torch.log1p(excess / (nearest + radius.square())) * (-self.power / 2)

    def affected(
        self, error: Tensor, allowed: float, drop: float, nearest: Tensor, radius: Tensor
    ) -> Tensor:
        s, power = nearest + radius.square(), self.power / 2
        return (s * math.expm1(drop / power)).minimum(power / allowed * error - s)

    def variance(self, squared: Tensor, radius: Tensor) -> Tensor:
        return (squared + radius.square()) / self.power

    def ratio(self, excess: Tensor, nearest: Tensor, radius: Tensor) -> Tensor:
        return excess / (nearest + excess + radius.square())

    def pull(self, factor: Tensor, squared: Tensor, radius: Tensor) -> Tensor:
        return self.power * factor / (squared + radius.square())

    def change(self, half: Tensor, moved: Tensor, squared: Tensor, radius: Tensor) -> Tensor:
        return -self.power * (half + radius * moved) / (squared + radius.square())

    def totals(
        self, g: Tensor, moment: Tensor, nearest: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor]:
        sum_c = -self.power * (g - moment) / (nearest + radius.square())
        return sum_c, radius * sum_c

    def is_limit(self, nearest: Tensor, radius: Tensor) -> Tensor:
        return nearest + radius.square() == 0

    def _per_square(self) -> float:
        return self.power


class _Gaussian(Law):
    """−d²/(2σ²). σ² may underflow, so σ divides twice."""

    adds_radius = False

    def score(self, squared: Tensor, radius: Tensor) -> Tensor:
        return torch.where(squared == 0, 0.0, -squared / radius / radius / 2)

    def relative_score(self, excess: Tensor, nearest: Tensor, radius: Tensor) -> Tensor:
        return -excess / radius / radius / 2

    def affected(
        self, error: Tensor, allowed: float, drop: float, nearest: Tensor, radius: Tensor
    ) -> Tensor:
        square = radius.square()
        return torch.where(error > 2 * allowed * square, 2 * drop * square, 0.0)

    def variance(self, squared: Tensor, radius: Tensor) -> Tensor:
        return radius.square()

    def ratio(self, excess: Tensor, nearest: Tensor, radius: Tensor) -> Tensor:
        return excess / radius / radius

    def pull(self, factor: Tensor, squared: Tensor, radius: Tensor) -> Tensor:
        return factor / radius / radius

    def change(self, half: Tensor, moved: Tensor, squared: Tensor, radius: Tensor) -> Tensor:
        return (squared * (moved / radius) - half) / radius / radius

    def totals(
        self, g: Tensor, moment: Tensor, nearest: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor]:
        return -g / radius / radius, (g * (nearest / radius / radius) + moment) / radius

    def is_limit(self, nearest: Tensor, radius: Tensor) -> Tensor:
        return (radius == 0) | (nearest / radius / radius).isinf()

    def _per_square(self) -> float:
        return 1


def law(D: float, N: int) -> Law:
    """The law of weights of D augmented dimensions, for N features."""
    return _Gaussian() if math.isinf(D) else _Power(N + D)


def unit_radius(D: float) -> float:
    """The radius of level σ = 1: √D, or σ itself at D = ∞."""
    return 1.0 if D > LARGEST else math.sqrt(D)


def check_singular(constant: Tensor, grad_logsumexp: Tensor) -> None:
    """Raises ValueError if the log-sum-exp has a gradient in a row whose mean is constant."""
    if checks_values(constant.device) and bool((bad := constant & (grad_logsumexp != 0)).any()):
        raise ValueError(singular_message(int(bad.flatten().nonzero()[0])))


def singular_message(row: int) -> str:
    return (
        f"return_logsumexp: in row {row} of x the gradient of the log-sum-exp overflows float64, "
        "or does not exist because r or sigma is 0; use a larger r or sigma."
    )
