"""The laws of weights, against the score and its derivatives by torch."""

import math

import pytest
import torch

from pfgm.core.weights import law, unit_radius

N = 7
LAWS = pytest.mark.parametrize("D", [0.5, 1.0, 128.0, 1e6, math.inf])
NEAREST = torch.tensor([0.3, 2.0, 50.0], dtype=torch.float64)
EXCESS = torch.tensor([0.01, 1.0, 3.0], dtype=torch.float64)


def radius(D):
    return torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64) * unit_radius(D)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@LAWS
def test_relative_scores_are_differences_of_scores(D):
    weights, r = law(D, N), radius(D)
    expected = weights.score(NEAREST + EXCESS, r) - weights.score(NEAREST, r)
    torch.testing.assert_close(
        weights.relative_score(EXCESS, NEAREST, r), expected, rtol=1e-6, atol=1e-9
    )


@LAWS
def test_sensitivities_are_derivatives_of_the_score(D):
    weights = law(D, N)
    squared, r = NEAREST.clone().requires_grad_(), radius(D).requires_grad_()
    by_squared, by_radius = torch.autograd.grad(weights.score(squared, r).sum(), (squared, r))
    squared, r, one = squared.detach(), r.detach(), torch.ones(3, dtype=torch.float64)
    close(weights.pull(one, squared, r), -2 * by_squared)
    close(weights.variance(squared, r), -0.5 / by_squared)
    close(weights.change(0.5 * one, 0 * one, squared, r), by_squared)
    close(weights.change(0 * one, one, squared, r), by_radius)
    if weights.adds_radius:
        close(by_radius, 2 * r * by_squared)


@LAWS
def test_an_error_matters_up_to_an_excess(D):
    """Beyond it a weight does not count, or the error changes no score by as much."""
    weights, r, fall, allowed = law(D, N), radius(D), 30.0, 1e-6
    for error in (1e-12, 1e-6, 1e-3, 1.0):
        error = torch.full((3,), error, dtype=torch.float64)
        excess = weights.affected(error, allowed, fall, NEAREST, r).clamp(min=0)
        falls = weights.relative_score(excess, NEAREST, r) <= -fall * (1 - 1e-9)
        changed = error / 2 / weights.variance(NEAREST + excess, r)
        assert (falls | (changed <= allowed * (1 + 1e-9))).all()
