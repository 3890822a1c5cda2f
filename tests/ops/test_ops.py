"""The operations in torch: registration, gradients, tracing and compiling."""

import math
import os
from functools import partial

import pytest
import torch
from torch.fx.experimental import symbolic_shapes

import pfgm
from benchmarks.common import problems
from pfgm import field_fn, log_density, posterior_mean
from pfgm.backends import native_parts
from pfgm.core import formulas

OP = torch.ops.pfgm.posterior_mean
BACKWARD = torch.ops.pfgm.posterior_mean_backward
WITHOUT_NATIVE = os.environ.get("PFGM_NATIVE") == "0"
native_only = pytest.mark.skipif(WITHOUT_NATIVE, reason="PFGM_NATIVE=0")
BEST = "torch" if WITHOUT_NATIVE else "native"


problem = partial(
    problems.problem, B=3, M=5, shape=4, sigma=(0.4, 1.5), spread=0.5, dtype=torch.float64
)


def opcheck_both(x, references, radius, *rest, op=OP, backward=BACKWARD, **options):
    """The operator and its backward pass, which is asked for the gradients that are wanted."""
    inputs = x, references, radius
    needs = [tensor.requires_grad for tensor in inputs]
    torch.library.opcheck(op, (*inputs, *rest), options)
    inputs = [tensor.detach() for tensor in inputs]
    mean, lse, nearest, total = op(*inputs, *rest, **options)
    saved = mean, nearest, total, needs, *inputs, *rest[:2]
    torch.library.opcheck(backward, (torch.ones_like(mean), torch.ones_like(lse), *saved), options)


@pytest.mark.parametrize(
    ("wanted", "D", "difference", "dtype", "count", "backend"),
    [
        ((), 1.0, False, torch.float32, 3, BEST),
        ((0,), math.inf, True, torch.float32, 3, "torch"),
        ((1,), 1.0, False, torch.float32, 3, "reference"),
        ((0, 1, 2), math.inf, True, torch.float32, 3, BEST),
        ((0,), 4.5, False, torch.bfloat16, 3, BEST),
        ((0, 2), 4.5, False, torch.uint8, 3, "torch"),
        ((0,), 1.0, False, torch.float32, 0, BEST),
        ((0,), 1.0, False, torch.float32, 0, "torch"),
    ],
)
def test_opcheck(wanted, D, difference, dtype, count, backend):
    x, references, radius = problem(dtype=torch.float32)
    if dtype != torch.float32:
        references = (references * 9).abs().to(dtype)
    inputs = x[:count], references, radius[:count]
    for index in wanted:
        inputs[index].requires_grad_()
    opcheck_both(*inputs, D, None, difference, backend=backend)


@native_only
def test_opcheck_with_a_sketch():
    x, references, radius = problem(shape=(513,), dtype=torch.float32)
    sketch = pfgm.ops.posterior_mean.sketch(references, x, "native")
    opcheck_both(x.requires_grad_(), references, radius, 1.0, sketch, backend="native")


def test_opcheck_with_a_D_that_varies():
    x, references, radius = problem()
    of = torch.ops.pfgm
    varying = {"op": of.posterior_mean_varying, "backward": of.posterior_mean_varying_backward}
    D = torch.tensor(4.5, dtype=torch.float64)
    opcheck_both(x.requires_grad_(), references, radius, D, **varying)


@pytest.mark.parametrize("backend", [BEST, "torch", "reference"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_without_a_function_refuse_other_arguments(backend, device):
    """With other shapes a kernel would leave memory that it never writes, or divide by 0."""
    of = torch.ops.pfgm
    for shape in ((), (3,), (3, 0), (3, 4, 5)):
        values, row = torch.ones(shape, device=device), torch.ones(shape[:1], device=device)
        arguments = values, row.double(), 5.0, backend
        for operator, upstream in (
            (of.normalised_field, ()),
            (of.normalised_field_backward, (values, row)),
        ):
            with pytest.raises(ValueError, match=r"difference must have shape \(B, N\).*got \("):
                operator(*upstream, *arguments)
    x = torch.ones(3, 4, device=device)
    step = (x, x, None, None, 2.0, 0.5, 0.0, None, 5.0, 5.0, True)
    with pytest.raises(ValueError, match="with_mean must be False without"):
        of.ode_step(*step, True, backend)


@native_only
@pytest.mark.parametrize("count", [0, 3])
def test_opcheck_of_references_in_parts(count):
    x, references, radius = problem(dtype=torch.float32)
    x, radius = x[:count], radius[:count]
    running = native_parts.begin(x, len(references))
    parts = torch.ops.pfgm.posterior_mean_add, torch.ops.pfgm.posterior_mean_end
    for part in references.split(2):
        torch.library.opcheck(parts[0], (*running, x, part, radius, 4.5))  # leaves running as it is
        parts[0](*running, x, part, radius, 4.5)
    torch.library.opcheck(parts[1], (x, radius, *running, 4.5))
    mean, lse, nearest, total = OP(x, references, radius, 4.5, backend="native")
    results = *parts[1](x, radius, *running, 4.5), running.nearest, running.total
    torch.testing.assert_close(results, (mean, lse, nearest, total))


@pytest.mark.parametrize(("backend", "count"), [(BEST, 0), (BEST, 3), ("reference", 3)])
def test_opcheck_of_the_normalised_field(backend, count):
    x, references, radius = problem(dtype=torch.float32)
    arguments = ((x - references[:3])[:count], radius[:count], 5.0, backend)
    torch.library.opcheck(torch.ops.pfgm.normalised_field, arguments)
    for value in arguments[:2]:
        value.requires_grad_()
    torch.library.opcheck(torch.ops.pfgm.normalised_field, arguments)
    upstream = torch.ones_like(arguments[0]), torch.ones(count)
    arguments = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in arguments)
    torch.library.opcheck(torch.ops.pfgm.normalised_field_backward, (*upstream, *arguments))


def field_inputs(B, N, dtype, generator):
    difference, G = (torch.randn(B, N, generator=generator, dtype=dtype) for _ in range(2))
    z = torch.rand(B, generator=generator, dtype=torch.float64) + 0.1
    return difference, z, G, torch.randn(B, generator=generator, dtype=dtype)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("B", "N"), [(1, 1), (7, 5), (3, 33), (2, 20_000)])
def test_gradients_of_the_normalised_field(backend, B, N, scale, gamma):
    """Against torch's own gradients of the formula in float64."""
    *inputs, G, g = field_inputs(B, N, torch.float32, torch.Generator().manual_seed(B))
    upstream, inputs = (G, g), [scale * value for value in inputs]
    gradients = torch.ops.pfgm.normalised_field_backward(*upstream, *inputs, gamma, backend)
    wide = [value.double().requires_grad_() for value in inputs]
    fields = formulas.normalised_field(*wide, gamma)
    expected = torch.autograd.grad(fields, wide, [value.double() for value in upstream])
    for gradient, wanted, value in zip(gradients, expected, inputs, strict=True):
        assert gradient.dtype == value.dtype
        size = (
            wanted.flatten(1).norm(dim=1, keepdim=True) if wanted.ndim > 1 else wanted.abs().max()
        )
        error = (gradient.double() - wanted) / size
        assert error.abs().max() < 2e-6


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_gradients_of_the_normalised_field_where_it_is_zero(backend, gamma):
    G, g = torch.randn(2, 3).double(), torch.randn(2).double()
    difference, z = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    gradients = torch.ops.pfgm.normalised_field_backward(G, g, difference, z, gamma, backend)
    scale = -(3**0.5) / gamma if gamma > 0 else 0.0
    torch.testing.assert_close(gradients, (scale * G, scale * g))


def test_gradients_of_the_normalised_field_of_strided_rows(backend):
    difference, z, G, g = field_inputs(4, 6, torch.float32, torch.Generator().manual_seed(0))
    expected = torch.ops.pfgm.normalised_field_backward(G, g, difference, z, 5.0, backend)
    strided = [torch.stack([v, v], dim=-1)[..., 0] for v in (G, g, difference, z)]
    gradients = torch.ops.pfgm.normalised_field_backward(*strided, 5.0, backend)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.equal(wanted)


def test_the_normalised_field_is_differentiated_once():
    difference, _, radius = problem(dtype=torch.float32)
    field_x, _ = torch.ops.pfgm.normalised_field(difference.requires_grad_(), radius, 5.0)
    (gradient,) = torch.autograd.grad(field_x.sum(), difference, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"x and references.*got \(3, 2, 2\) and \(", {"x": torch.zeros(3, 2, 2)}),
        (TypeError, r"x must be.*got torch\.bfloat", {"x": torch.zeros(3, 4).bfloat16()}),
        (ValueError, r"radius must be.*got torch\.float6", {"radius": torch.ones(2).double()}),
        (ValueError, r"radius must be.*got torch\.float32 of", {"radius": torch.ones(3)}),
        (ValueError, r"D must be a positive number or infinity, got 0\.0\.", {"D": 0.0}),
        (ValueError, "references on meta", {"references": torch.zeros(5, 4, device="meta")}),
    ],
)
def test_the_op_checks_its_own_arguments(error, message, change):
    arguments = dict(zip(("x", "references", "radius"), problem(), strict=True)) | {"D": 1.0}
    with pytest.raises(error, match=message):
        OP(**arguments | change)


def steps(x, z, gamma=5.0, in_place=False):
    field = pfgm.Field(x.sin(), -1 - x.flatten(1).square().sum(1), gamma=gamma, z_exp=2 * gamma)
    outputs = {"out": torch.empty_like(x), "mean_out": torch.empty_like(x)} if in_place else {}
    first, mean = pfgm.euler_step(x, field, z, z / 2, return_mean=True, **outputs)
    second = pfgm.heun_step(first, 2 * x, 3 * x, z, z / 2)
    return pfgm.multistep_step(second, x.sin(), z, z / 2, mean, 2 * z)[0]


def results(x, references, radius, D, backend, function):
    if function == "steps":
        fixed = steps(x.detach(), radius.detach())  # with gradients the formula is compiled
        return fixed + x * references.sum() * radius.sum()
    if function == "field_fn":
        return field_fn(x, radius, references, backend=backend)
    weigh = problems.level(radius, D)
    if function == "log_density":
        return log_density(x, references, D=D, backend=backend, **weigh)
    return posterior_mean(x, references, D=D, return_logsumexp=True, backend=backend, **weigh)


@pytest.mark.parametrize(
    ("function", "D", "backend"),
    [
        *(
            ("posterior_mean", D, backend)
            for D in (1.0, math.inf)
            for backend in dict.fromkeys((BEST, "torch", "reference"))
        ),
        ("posterior_mean", 0.5, BEST),
        ("posterior_mean", 128.0, BEST),
        ("log_density", 1.0, "reference"),
        ("log_density", 4.5, BEST),
        ("log_density", math.inf, "torch"),
        ("field_fn", 1.0, BEST),
        ("field_fn", 1.0, "reference"),
    ],
)
def test_gradients_of_everything(function, D, backend):
    shape = (2, 3) if D in (1.0, 4.5) else (4,)
    arguments = [t.requires_grad_() for t in problem(shape=shape)]
    assert torch.autograd.gradcheck(
        lambda x, references, radius: results(x, references, radius, D, backend, function),
        arguments,
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("function", ["posterior_mean", "log_density", "field_fn"])
def test_gradient_of_one_noise_level_for_all(function):
    x, references, _ = problem()
    radius = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda radius: results(x, references, radius, 1.0, None, function), [radius]
    )


@pytest.mark.parametrize(
    ("function", "backend"),
    [("posterior_mean", BEST), ("log_density", "torch"), ("field_fn", "reference")],
)
def test_a_second_derivative_raises(function, backend):
    x, references, radius = problem()
    x.requires_grad_()
    result = results(x, references, radius, 1.0, backend, function)
    result = result if torch.is_tensor(result) else result[0]
    for loss in (result.square().sum(), result.sum()):  # the upstream of the second is constant
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            gradient.sum().backward(retain_graph=True)


def test_backward_uses_the_backend_of_the_forward_pass(monkeypatch):
    used = []
    for name in ("native", "reference"):
        module = getattr(pfgm.backends, name)
        original = module.posterior_mean_backward

        def spy(*args, name=name, original=original):
            used.append(name)
            return original(*args)

        monkeypatch.setattr(module, "posterior_mean_backward", spy)
    x, references, radius = problem()
    x.requires_grad_()
    with pfgm.use_backend("reference"):
        within = posterior_mean(x, references, r=radius)
    explicit = posterior_mean(x, references, r=radius, backend="reference")
    within.sum().backward()
    explicit.sum().backward()
    with pfgm.use_backend("reference"):
        outside = posterior_mean(x, references, r=radius, backend=None)
    assert used == ["reference", "reference"]
    monkeypatch.setenv("PFGM_BACKEND", "native")
    outside.sum().backward()
    assert used[2:] == ["reference"]


@pytest.fixture
def compiled():
    """Compiles in one graph for torch.compile's autograd, without generating code."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def with_gradients(function, *arguments):
    arguments = [t.detach().clone().requires_grad_() for t in arguments]
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((o.double() * (i + 1)).sin().sum() for i, o in enumerate(outputs))
    return *outputs, *torch.autograd.grad(loss, arguments)


@pytest.mark.parametrize(
    ("function", "D", "backend"),
    [
        ("field_fn", 1.0, BEST),
        ("posterior_mean", math.inf, "torch"),
        ("log_density", 4.5, BEST),
        ("steps", 1.0, BEST),
    ],
)
def test_compiled_is_the_same(compiled, function, D, backend):
    def call(x, references, radius):
        return results(x, references, radius, D, backend, function)

    fast = compiled(call)
    for B in (3, 2, 4):  # the second and third go through dynamic shapes
        arguments = problem(B=B, shape=(2, 2), dtype=torch.float32)
        for actual, expected in zip(
            with_gradients(fast, *arguments), with_gradients(call, *arguments), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_compiled_points_may_be_stored_by_features(compiled, backend):
    """A compiler counts on results whose rows follow each other."""
    x, slope = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).mT
    y = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))

    def call(x, slope):
        mean = pfgm.posterior_mean(x, y, r=2.0, backend=backend)
        step = pfgm.euler_step(x.detach(), slope, 2.0, 1.0, backend=backend)
        return mean.square().sum(), step

    results = []
    for function in (call, compiled(call)):
        points = x.detach().requires_grad_()
        total, step = function(points, pfgm.Field(slope, -torch.ones(5)))
        results.append((*torch.autograd.grad(total, points), step))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(2, 2, 2), ()])
def test_a_compiled_graph_gets_the_tensors_themselves(shape):
    """Inductor saves views that were made in the graph without a version counter."""
    torch._dynamo.reset()
    nodes = []

    def look(graph, _):
        nodes.extend(graph.graph.nodes)
        return graph.forward

    x, references = torch.randn(4, *shape), torch.randn(9, *shape)
    z = torch.rand(4, dtype=torch.float64)
    fast = torch.compile(lambda x, y, z: field_fn(x, z, y), fullgraph=True, backend=look)
    torch.testing.assert_close(fast(x, references, z), field_fn(x, z, references))
    (call,) = (node for node in nodes if node.target is OP.default or node.target is OP)
    assert [argument.op for argument in call.args[:2]] == ["placeholder"] * 2


@native_only
def test_compiled_code_follows_use_backend(compiled, monkeypatch):
    used = []
    original = pfgm.backends.reference.posterior_mean

    def spy(*args):
        used.append("reference")
        return original(*args)

    monkeypatch.setattr(pfgm.backends.reference, "posterior_mean", spy)
    x, references, _ = problem()
    fast = compiled(lambda x: posterior_mean(x, references, r=0.5))
    fast(x)
    assert not used
    with pfgm.use_backend("reference"):
        fast(x)
    assert used == ["reference"]
    fast(x)
    assert used == ["reference"]


VARYING = {
    "field_fn": lambda x, y, z, gamma, D: field_fn(x, z, y, gamma=gamma),
    "log_density": lambda x, y, r, _, D: log_density(x, y, sigma=r, D=D),
    "steps": lambda x, y, z, gamma, D: steps(x, z, gamma, in_place=True),
}


@pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"),
    reason="this version of torch cannot tell whether a number is symbolic",
)
@pytest.mark.parametrize("name", VARYING)
def test_numbers_that_vary_are_not_compiled_anew(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    # Outputs in place are made functional, with numbers that vary, by AOTAutograd alone.
    backend = "aot_eager" if name == "steps" else "eager"
    counter, function = CompileCounterWithBackend(backend), VARYING[name]
    fast = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    generator = torch.Generator().manual_seed(0)

    def check(*inputs):
        torch.testing.assert_close(fast(*inputs), function(*inputs), rtol=1e-5, atol=1e-5)

    numbers = [(0.5, 5.0, 1.0), (1.5, 4.0, 2.5), (2.5, 3.0, 128.0), (9.5, 0.3, 4.5)]
    if name == "log_density":
        numbers.append((1.5, 5.0, 3e6))
    for count, (z, gamma, D) in enumerate(numbers, 3):
        x = torch.randn(count, count + 1, generator=generator)
        references = torch.randn(count + 2, count + 1, generator=generator)
        check(x, references, z, gamma, D)
    assert counter.frame_count <= 3
    if D_matters := name == "log_density":
        check(x, references, z, gamma, math.inf)
    check(x, references, torch.linspace(1, 2, len(x), dtype=torch.float64), gamma, D)
    assert counter.frame_count <= 5 + D_matters
    torch._dynamo.reset()


def test_gradients_with_a_D_that_varies():
    torch._dynamo.reset()

    def call(x, references, radius, D):
        return posterior_mean(x, references, r=radius, D=D, return_logsumexp=True)

    fast = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for D in (1.0, 4.5, 128.0):
        result = with_gradients(partial(fast, D=D), *problem())
        torch.testing.assert_close(result, with_gradients(partial(call, D=D), *problem()))
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_gives_the_same_results():
    torch._dynamo.reset()
    arguments = problem(dtype=torch.float32)

    def call(x, references, z):
        return field_fn(x, z, references)

    fast = torch.compile(call, fullgraph=True)
    for actual, expected in zip(
        with_gradients(fast, *arguments), with_gradients(call, *arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@native_only
def test_parts_check_the_sums_that_they_write_to():
    x, references, radius = problem()
    for change, message in (
        ({0: torch.zeros(2, 4, dtype=torch.float64)}, r"sums must have.*got \(2, 4\) and to"),
        ({0: torch.zeros(3, 4)}, r"sums must have shape.*got \(3, 4\) and torch\.float32"),
        ({0: torch.zeros(4, 3, dtype=torch.float64).T}, r"sums must be.*got strides \(1, "),
        ({1: torch.zeros(2, dtype=torch.float64)}, r"nearest must have.*got \(2,\) and torch\."),
        ({2: torch.zeros(6, dtype=torch.float64)[::2]}, r"total must be.*got strides \(2,\)"),
    ):
        running = list(native_parts.begin(x, len(references)))
        for place, value in change.items():
            running[place] = value
        with pytest.raises(ValueError, match=message):
            torch.ops.pfgm.posterior_mean_add(*running, x, references, radius, 1.0)
        with pytest.raises(ValueError, match=message):
            torch.ops.pfgm.posterior_mean_end(x, radius, *running, 1.0)
