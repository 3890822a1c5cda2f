"""The operator posterior_mean and its derivatives.

It returns the mean, the log-sum-exp, the squared distance of the nearest reference, and the total
weight relative to that of the nearest. From the last two the backward pass computes the weights in
one pass. With ``difference`` it returns x − mean in place of the mean: formed before any rounding,
it keeps its digits where x is near the mean. The operators of the backward pass take the mean.

The operators take points and references of any sample shape and flatten them themselves. In a graph
of torch.compile a tensor that is flattened outside would be saved for the backward pass as a view
without a version counter, and a change of it in place would go unnoticed.

posterior_mean_varying is the same operator with D as a tensor. torch.compile specialises a graph to
the value of a number and would compile again for each D. It does not do so for a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..backends import choose_for, requested
from ..common import transforms
from ..common.dtypes import REFERENCES
from ..common.numbers import is_symbolic
from ..common.tensors import flat_rows, wide_dtype
from ..core import formulas
from ..core.problems import PosteriorMean, State, Tangents, Upstream
from ..core.weights import law
from .library import Operator, as_arguments, no_gradient, save_nothing

_BACKEND = "str? backend=None"
_RESULTS = "Tensor mean, Tensor logsumexp, Tensor nearest, Tensor total"
_GRADIENTS = "Tensor grad_x, Tensor grad_references, Tensor grad_radius"
_FORWARD_TAKES = (PosteriorMean, _BACKEND)
_BACKWARD_TAKES = (Upstream, State, "bool[] needs", PosteriorMean, _BACKEND)

FORWARD = Operator("posterior_mean", _FORWARD_TAKES, _RESULTS)
"""``(problem, backend)`` → mean or difference, log-sum-exp, nearest and total."""
BACKWARD = Operator("posterior_mean_backward", _BACKWARD_TAKES, _GRADIENTS)
"""``(upstream, state, needs, problem, backend)`` → the gradients of x, references and radius. Those
that are not needed are empty."""
_FORWARD_VARYING = Operator("posterior_mean_varying", _FORWARD_TAKES, _RESULTS, D="Tensor")
_BACKWARD_VARYING = Operator(
    "posterior_mean_varying_backward", _BACKWARD_TAKES, _GRADIENTS, D="Tensor"
)


def compute(problem: PosteriorMean, backend: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean or difference (B, N), log-sum-exp, and nearest and total (B,), of which the last two
    have no gradient.

    The backward pass uses the backend that is requested now, not the one requested later.
    """
    backend = requested(backend)
    compiled = torch.compiler.is_compiling()
    if compiled and transforms.forward_mode() and not transforms.in_torch_func():
        raise RuntimeError(
            "torch.compile drops the dual numbers of torch.autograd.forward_ad in "
            "pfgm.posterior_mean (and field_fn, log_density); use torch.func.jvp inside the "
            "compiled function."
        )
    if is_symbolic(problem.D) and not transforms.in_torch_func():
        D = torch.ones((), dtype=torch.float64, device="cpu") * problem.D
        results = _FORWARD_VARYING(problem._replace(D=D), backend)  # type: ignore[arg-type]
    elif transforms.forward_mode() and not compiled:
        results = _transformed(problem, backend)
    else:
        results = FORWARD(problem, backend)
    mean, logsumexp, nearest, total = results
    return mean, logsumexp, nearest, total


def sketch(references: Tensor, x: Tensor, backend: str | None) -> Tensor | None:
    """The backend's sketch, a summary of references (M, N), for points of the dtype of x.

    It is valid while the references stay the same. It is None if the backend makes none.
    """
    return choose_for(backend, x, references).sketch(references, x.dtype)


def _rows(problem: PosteriorMean) -> PosteriorMean:
    """The problem on rows (B, N) and (M, N), with D as a number.

    Raises ValueError if the samples differ in shape.
    """
    x, references = problem[:2]
    D: Any = problem.D
    if x.shape[1:] != references.shape[1:] or x.ndim == 0 or references.ndim == 0:
        raise ValueError(
            "x and references must have shapes (B, N) and (M, N), or other samples of the same "
            f"shape, got {tuple(x.shape)} and {tuple(references.shape)}."
        )
    if isinstance(D, Tensor):
        # A fake tensor has no value. Tracing needs shapes only, and they do not depend on D.
        D = 1.0 if isinstance(D, FakeTensor) else D.item()
    return problem._replace(x=flat_rows(x), references=flat_rows(references), D=D)


def _shaped(
    gradients: Sequence[Tensor], needs: Sequence[bool], problem: PosteriorMean
) -> tuple[Tensor, ...]:
    """Gradients of rows in the shapes of the samples. Those not needed stay empty."""
    pairs = zip(gradients, problem[:3], needs, strict=True)
    return tuple(g.view(like.shape) if needed else g for g, like, needed in pairs)


def check(problem: PosteriorMean) -> None:
    """Raises ValueError or TypeError if the arguments are not allowed."""
    x, references, radius, D = problem[:4]
    if x.ndim != 2 or references.ndim != 2 or x.shape[1] != references.shape[1]:
        raise ValueError(
            f"x and references must have shapes (B, N) and (M, N), got {tuple(x.shape)} and "
            f"{tuple(references.shape)}."
        )
    if x.shape[1] == 0:
        raise ValueError(f"x must have shape (B, N) with N ≥ 1, got {tuple(x.shape)}.")
    if references.shape[0] == 0:
        raise ValueError("references must hold at least one reference, got none.")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}.")
    if references.dtype not in REFERENCES:
        raise TypeError(
            f"references must be one of {', '.join(map(str, REFERENCES))}, got {references.dtype}."
        )
    if radius.shape != x.shape[:1] or radius.dtype != wide_dtype(x.device):
        raise ValueError(
            f"radius must be {wide_dtype(x.device)} of shape ({x.shape[0]},), got {radius.dtype} "
            f"of shape {tuple(radius.shape)}."
        )
    if not x.device == references.device == radius.device:
        raise ValueError(
            f"x is on {x.device}, references on {references.device}, radius on {radius.device}; "
            "all must be on one device."
        )
    if not D > 0:
        raise ValueError(f"D must be a positive number or infinity, got {D}.")


def forward(problem: PosteriorMean, backend: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The implementation of posterior_mean, for rows (B, N) and (M, N)."""
    check(problem)
    x, references, radius = problem[:3]
    transforms.check_no_tangent("posterior_mean", x, references, radius)
    chosen = choose_for(backend, x, references)
    if x.shape[0] == 0:
        return _empty(problem)
    return chosen.posterior_mean(problem)


def _fake(problem: PosteriorMean, backend: str | None) -> tuple[Tensor, ...]:
    rows = _rows(problem)
    check(rows)
    return _empty(rows)


def _empty(problem: PosteriorMean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = torch.empty_like(problem.x, memory_format=torch.contiguous_format)
    logsumexp, nearest, total = (torch.empty_like(problem.radius) for _ in range(3))
    return mean, logsumexp, nearest, total


def _backward(
    upstream: Upstream,
    state: State,
    needs: list[bool],
    problem: PosteriorMean,
    backend: str | None,
) -> tuple[Tensor, ...]:
    rows = _rows(problem)
    x, references, radius = rows[:3]
    transforms.check_no_tangent("posterior_mean_backward", *upstream, x, references, radius)
    gradients: tuple[Tensor | None, ...]
    if x.shape[0] == 0:
        gradients = tuple(torch.zeros_like(value) for value in (x, references, radius))
    else:
        chosen = choose_for(backend, x, references)
        gradients = chosen.posterior_mean_backward(
            rows, state, upstream, (needs[0], needs[1], needs[2])
        )
    results = [
        gradient if needed and gradient is not None else x.new_empty(0)
        for gradient, needed in zip(gradients, needs, strict=True)
    ]
    return _shaped(results, needs, problem)


def _fake_backward(
    upstream: Upstream,
    state: State,
    needs: list[bool],
    problem: PosteriorMean,
    backend: str | None,
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format)
        if needed
        else problem.x.new_empty(0)
        for value, needed in zip(problem[:3], needs, strict=True)
    )


def pulled_back(
    compute: Callable[[Tensor, Upstream], Sequence[Tensor | None]],
    likes: tuple[Tensor, Tensor, Tensor],
    difference: bool,
    gradients: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, references and radius, from those of the results of a forward pass.

    A difference x − mean has a gradient of its own in x.

    Args:
        compute: (mean, upstream) → the gradients of x, references and radius.
        likes: x, the result and radius.
        difference: whether the result is a difference.
        gradients: of the result and the log-sum-exp; None for one without. Others are not used.
        needs: which gradients are needed. The others become None.
    """
    x, result, radius = likes
    G, g = (
        torch.zeros_like(like) if gradient is None else gradient
        for gradient, like in zip(gradients, (result, radius), strict=False)
    )
    mean, grad_mean = (flat_rows(x) - result, -G) if difference else (result, G)
    each = zip(compute(mean, Upstream(grad_mean, g)), needs, strict=True)
    grad_x, *rest = (gradient if needed else None for gradient, needed in each)
    if difference and grad_x is not None:
        grad_x = grad_x + G.view(x.shape)
    return grad_x, *rest


# Without this, autograd would treat the gradient as constant and give a wrong second derivative.
_no_second_derivative = no_gradient(
    "pfgm.posterior_mean (and field_fn, log_density) can be differentiated once; its gradient "
    "has no derivative of its own."
)


class OnceDifferentiable(transforms.Rowwise):
    """A derivative that raises RuntimeError if it is differentiated again."""

    setup_context = staticmethod(save_nothing)
    backward = staticmethod(_no_second_derivative)
    jvp = staticmethod(_no_second_derivative)


class _PosteriorMean(transforms.Rowwise):
    """The operator posterior_mean with its gradient, its tangent and a batching rule."""

    shared = FORWARD.indices("references", "sketch")
    forward = staticmethod(FORWARD.overload)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, ctx.backend = FORWARD.groups(inputs)
        x, references, radius, D, sketch, ctx.difference = problem
        result, _, nearest, total = output
        ctx.D, varying_D = (None, D) if isinstance(D, Tensor) else (D, None)
        ctx.save_for_backward(x, references, radius, result, nearest, total, sketch, varying_D)
        ctx.save_for_forward(x, references, radius)
        ctx.mark_non_differentiable(nearest, total)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        x, references, radius, result, nearest, total, sketch, varying_D = ctx.saved_tensors
        operator, D = (BACKWARD, ctx.D) if varying_D is None else (_BACKWARD_VARYING, varying_D)
        problem = PosteriorMean(x, references, radius, D, sketch)

        def compute(mean: Tensor, upstream: Upstream) -> tuple[Tensor, ...]:
            state = State(mean, nearest, total)
            results: tuple[Tensor, ...] = operator(upstream, state, needs, problem, ctx.backend)
            return results

        of_inputs = pulled_back(compute, (x, result, radius), ctx.difference, gradients, needs)
        return (*of_inputs, *[None] * (len(ctx.needs_input_grad) - 3))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors[:3], *tangents[:3])
        mean_tangent, lse_tangent = _Tangent.apply(  # type: ignore[no-untyped-call]
            *inputs, ctx.D, ctx.backend
        )
        return result_tangent(mean_tangent, tangents[0], ctx.difference), lse_tangent, None, None


class _Backward(OnceDifferentiable):
    """The operator posterior_mean_backward, with a batching rule."""

    forward = staticmethod(BACKWARD.overload)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        _, _, needs, _, _ = BACKWARD.groups(arguments)
        return transforms.map_rows(
            cls.apply,
            info.batch_size,
            in_dims,
            arguments,
            shared=BACKWARD.indices("references", "sketch"),
            by_rows=not needs[1],  # the gradient of references sums over rows
        )


class _Tangent(OnceDifferentiable):
    """(x, references, radius, their tangents, D, backend) → tangents of mean and lse."""

    shared = (1, 4)  # references and their tangent

    @staticmethod
    def forward(
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        tangent_x: Tensor | None,
        tangent_references: Tensor | None,
        tangent_radius: Tensor | None,
        D: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        # In float64 if the backend supports it, because terms of the size of N + D cancel.
        wide = x.to(tangent_dtype(x, references, backend))
        problem = PosteriorMean(wide, references, radius, D)
        tangents = Tangents(tangent_x, tangent_references, tangent_radius)
        mean, _, nearest, total = FORWARD(problem, backend)
        center = mean.to(radius.dtype)
        adds_radius = law(D, x.shape[1]).adds_radius
        if tangent_references is not None or not (adds_radius or tangent_radius is None):
            state = State(center, nearest, total)
            mean_tangent, lse_tangent = formulas.posterior_mean_tangent(problem, state, tangents)
        else:
            state = State(mean, nearest, total)
            mean_tangent, lse_tangent = tangent_from_gradients(
                problem, state, center, tangents, backend
            )
        return mean_tangent.to(x.dtype), lse_tangent


def result_tangent(mean_tangent: Tensor, x_tangent: Tensor | None, difference: bool) -> Tensor:
    """The tangent of the result of a forward pass, from those of the mean and of x."""
    if not difference:
        return mean_tangent
    return -mean_tangent if x_tangent is None else x_tangent - mean_tangent


def tangent_dtype(x: Tensor, references: Tensor, backend: str | None) -> torch.dtype:
    """float64, or the dtype of x if the backend does not compute in float64."""
    chosen = choose_for(backend, x, references)
    wide = wide_dtype(x.device)
    return x.dtype if chosen.supports(x.device, wide, references.dtype) else wide


def tangent_from_gradients(
    problem: PosteriorMean,
    state: State,
    center: Tensor,
    tangents: Tangents,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The tangents of mean and log-sum-exp in float64, computed by one backward pass.

    With the upstream gradients G = ẋ and g = (mean − x)·ẋ − r ṙ the backward pass computes

        t_j = (x_j − x)·ẋ − r ṙ,   c_j = −(N + D) p_j t_j / s_j,   grad_x = Σ_j c_j (x − x_j)

    The tangent of the mean is −Σ c_j (x_j − center) = grad_x + (center − x) Σ c_j, and that of the
    log-sum-exp is −Σ c_j. Σ c_j is the gradient in r divided by r; at D = ∞ it is −g/σ². Where
    the mean is constant, its tangent is 0 and that of the log-sum-exp NaN.

    Args:
        problem: the problem over these references, which may be a part of all.
        state: the result of the problem.
        center: (B, N) in float64, the mean over all references.
        tangents: tangents of x and radius; at D = ∞ of x alone. References have none.
        backend: the backend of the backward pass.
    """
    x, radius, D = problem.x, problem.radius, problem.D
    wide = center.dtype
    weights = law(D, x.shape[1])
    unmoved = weights.is_constant(state.nearest, radius)
    moved = torch.zeros_like(x) if tangents.x is None else tangents.x.to(x.dtype)
    moved = torch.where(unmoved[:, None], 0.0, moved)
    g = (moved.to(wide) * (state.mean.to(wide) - x.to(wide))).sum(1)
    if tangents.radius is not None:
        g = g - radius * tangents.radius
    g = torch.where(unmoved, 0.0, g)
    if weights.adds_radius:
        # At r = 0 the gradient r Σ c_j would be 0. A radius too small to change s replaces it.
        radius = torch.maximum(radius, 1e-10 * state.nearest.sqrt())
    needs, problem = [True, False, weights.adds_radius], problem._replace(radius=radius)
    grad_x, _, grad_radius = BACKWARD(Upstream(moved, g), state, needs, problem, backend)
    sum_c = grad_radius / radius if weights.adds_radius else -g / radius / radius
    sum_c = torch.where(unmoved, 0.0, sum_c)
    mean_tangent = grad_x.to(wide) + sum_c[:, None] * (center - x.to(wide))
    return mean_tangent, torch.where(unmoved, math.nan, -sum_c)


def _transformed(problem: PosteriorMean, backend: str | None) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...]
    results = _PosteriorMean.apply(*as_arguments(_rows(problem), backend))  # type: ignore[no-untyped-call]
    return results


def _transformed_backward(
    upstream: Upstream,
    state: State,
    needs: list[bool],
    problem: PosteriorMean,
    backend: str | None,
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _Backward.apply(  # type: ignore[no-untyped-call]
        *as_arguments(upstream, state, needs, _rows(problem), backend)
    )
    return _shaped(gradients, needs, problem)


for _forward_op, _backward_op, _transforms in (
    (FORWARD, BACKWARD, (_transformed, _transformed_backward)),
    (_FORWARD_VARYING, _BACKWARD_VARYING, (None, None)),
):
    _forward_op.register(
        lambda problem, backend: forward(_rows(problem), backend),
        fake=_fake,
        transformed=_transforms[0],
        gradient=_PosteriorMean.backward,
        save=_PosteriorMean.setup_context,
    )
    _backward_op.register(
        _backward, fake=_fake_backward, transformed=_transforms[1], gradient=_no_second_derivative
    )
