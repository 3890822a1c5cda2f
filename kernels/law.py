"""How the weight of a reference falls with its distance, relative to the nearest reference.

With s = d² + r², the weight is s^−(N + D)/2 for finite D, and exp(−d²/2σ²) at D = ∞ (GAUSSIAN).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def exponent_of(N: int, D: float) -> float:
    """(N + D)/2, the exponent of s; at D = ∞ 1/2, the factor of d²/σ²."""
    return 0.5 if math.isinf(D) else (N + D) / 2


def difference_cutoff(nats: float, N: int, D: float) -> float:
    """The cutoff of weights for x − mean, from that for a mean, ``nats`` below the sum of weights.

    In x − mean a weight counts times the distance of its reference, relative to that of the nearest
    one: (s/s₀)^½ w = w^(1 − 1/(N + D)) for finite D. At most 80, because e^-80 is a normal float32.
    """
    return nats if math.isinf(D) else min(80.0, nats / max(1 - 1 / (N + D), 0.1))


@triton.jit
def rate_of(nearest, r, exponent, GAUSSIAN: tl.constexpr):
    """Nats by which the score falls per squared distance at ``nearest``, in float64.

    It is infinite where r = 0 on a reference. Capped at 1e300, so that an equal distance (0 times
    the rate) keeps the weight 1.
    """
    if GAUSSIAN:
        rate = 0.5 / r / r
    else:
        rate = exponent / (nearest + r * r)
    return tl.minimum(rate, 1e300)


@triton.jit
def relative_weight(excess, rate, exponent, GAUSSIAN: tl.constexpr):
    """The weight at the squared distance nearest + ``excess``, over that at nearest; in float32.

    The score falls by excess·rate if GAUSSIAN, else by exponent·log1p(u), u = excess·rate/exponent.
    Where u is small, the fall is excess·rate times log1p(u)/u, because the exponent may be larger
    than float32 holds.
    """
    linear = (excess * rate).to(tl.float32)
    if GAUSSIAN:
        fall = linear
    else:
        power = tl.full((), exponent, tl.float64).to(tl.float32)
        u = linear * (1.0 / power)
        q = u / (2.0 + u)
        p = q * q  # log1p(u) = 2 artanh(q)
        series = 1 / 9.0 + p * (1 / 11.0 + p * (1 / 13.0))
        series = 1.0 + p * (1 / 3.0 + p * (1 / 5.0 + p * (1 / 7.0 + p * series)))
        near = linear * (2.0 / (2.0 + u)) * series
        fall = tl.where(u <= 1.0, near, power * tl.log(1.0 + u))
        fall = tl.where(u > 2.0**100, float("inf"), fall)
    return tl.exp(-fall)


@triton.jit
def excess_at(nats, rate, exponent, GAUSSIAN: tl.constexpr):
    """The excess over ``nearest`` at which the score has fallen by some nats, in float64."""
    if GAUSSIAN:
        excess = nats / rate
    else:
        excess = exponent / rate * (tl.exp(nats / exponent) - 1.0)
    return excess


@triton.jit
def score_at(nearest, r, exponent, GAUSSIAN: tl.constexpr):
    """The score of the nearest reference in float64."""
    if GAUSSIAN:
        score = tl.where(nearest == 0.0, 0.0, -nearest / r / r / 2.0)
    else:
        power = tl.where(nearest == 0.0, 2.0, 1.0)  # r² may underflow on a reference
        score = -exponent * power * tl.log(tl.where(nearest == 0.0, r, nearest + r * r))
    return score


@triton.jit
def ratios_at(squared, nearest, r, GAUSSIAN: tl.constexpr):
    """s₀/s and (d² − d₀²)/s, with s₀ and d₀² of the nearest; at D = ∞ 1 and (d² − d₀²)/σ²."""
    if GAUSSIAN:
        ratio, excess = tl.full((), 1.0, tl.float64), (squared - nearest) / r / r
    else:
        s = squared + r * r
        ratio, excess = (nearest + r * r) / s, (squared - nearest) / s
    return ratio, excess


@triton.jit
def gradient_factors(nearest, r, g, moment, exponent, GAUSSIAN: tl.constexpr):
    """F, C and ∂L/∂r of posterior_mean_backward.py; F = ∂L/∂r = 0 where the mean is constant."""
    if GAUSSIAN:
        F, C = 1.0 / r / r, -g
        by_radius = (g * (nearest / r / r) + moment) / r
    else:
        F, C = 2.0 * exponent / (nearest + r * r), moment - g
        by_radius = r * F * C
    constant = is_constant(nearest, r, GAUSSIAN)
    return tl.where(constant, 0.0, F), C, tl.where(constant, 0.0, by_radius)


@triton.jit
def is_constant(nearest, r, GAUSSIAN: tl.constexpr):
    """Where the mean is locally constant: r = 0 on a reference, or scores that overflow."""
    if GAUSSIAN:
        constant = (r == 0.0) | (nearest / r / r == float("inf"))
    else:
        constant = nearest + r * r == 0.0
    return constant
