"""Calls of the CUDA kernels without the operators: when they are made, and that they agree."""

import functools
import math

import pytest
import torch

import pfgm
from pfgm.backends import native, native_calls
from tests.ops import public_calls
from tests.ops.public_calls import FUNCTIONS, STEPS, assert_same

B = 5
call = functools.partial(public_calls.call, backend="native")


@pytest.fixture
def inputs(device):
    return functools.partial(public_calls.values_for, device=device)


def assert_close(name, results, expected):
    """The same bits, but for logarithms of levels in tensors: torch's may differ by a last bit."""
    if name != "multistep_step":
        return assert_same(results, expected)
    for value, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=3e-7, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5, 5), (700,)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_ways_give_the_same_bits(inputs, by_operators, one_calls, name, shape):
    values = inputs(shape=shape)
    results = call(name, values)
    assert one_calls == [True]
    assert_same(results, by_operators(lambda: call(name, values)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (20, 70, 64), (33, 129, 40)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str
)
def test_references_of_every_dtype(inputs, by_operators, one_calls, sizes, dtype):
    rows, references, features = sizes
    values = inputs(rows, (features,), references=references)
    values[1] = (100 * values[1].abs()).to(dtype)

    def both():
        mean = call("posterior_mean", values, return_logsumexp=True)
        return *mean, *call("field_fn", values)

    results = both()
    assert one_calls == [True, True]
    assert_same(results, by_operators(both))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["number", "rows"])
@pytest.mark.parametrize(
    ("level", "D"), [("r", 1), ("r", 4.5), ("sigma", 1.0), ("sigma", 128), ("sigma", math.inf)]
)
def test_the_log_sum_exp(inputs, device, by_operators, one_calls, level, D, form):
    x, references = inputs()[:2]
    value = 0.7 if form == "number" else torch.linspace(0.1, 1, B, device=device)

    def both():
        options = {level: value, "D": D, "return_logsumexp": True, "backend": "native"}
        return pfgm.posterior_mean(x, references, **options)

    results = both()
    assert one_calls == [True]
    assert results[1].dtype == torch.float64
    assert_same(results, by_operators(both))


def levels(form, shape, device):
    """z, z_next and z_previous of one form."""

    def level(value):
        if form == "int":
            return int(value)
        if form in ("0-d float32", "0-d float64"):
            return torch.tensor(value, dtype=getattr(torch, form[4:]), device=device)
        if form == "every other":
            return torch.linspace(value, 1.1 * value, 2 * B, device=device)[::2]
        if form == "expanded":
            return torch.full((1,), value, device=device).expand(B)
        rows = torch.linspace(value, 1.1 * value, B, dtype=torch.float64, device=device)
        if form == "a 1 for each dimension":
            return rows.float().view(B, *[1] * len(shape))
        return rows if form == "float64" else rows.float()

    results = {"z": level(3.0), "z_next": level(2.0), "z_previous": level(4.0)}
    return results | {"z": 3.0, "z_previous": 4} if form == "some are numbers" else results


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "form",
    [
        "int", "float32", "float64", "0-d float32", "0-d float64", "every other", "expanded",
        "a 1 for each dimension", "some are numbers",
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3,), (2, 5, 5)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_levels_of_every_form(inputs, device, by_operators, one_calls, name, shape, form):
    values, forms = inputs(shape=shape), levels(form, shape, device)
    results = call(name, values, **forms)
    assert one_calls == [True]
    assert_close(name, results, by_operators(lambda: call(name, values, **forms)))


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_levels_of_many_rows(inputs, device, by_operators, rows):
    values = inputs(rows, (2,))
    z = torch.logspace(-2, 2, rows, dtype=torch.float64, device=device)
    for name in FUNCTIONS:
        results, expected = (
            run(lambda name=name: call(name, values, z, z / 2, 2 * z))
            for run in (lambda function: function(), by_operators)
        )
        assert_close(name, results, expected)


def test_which_kernels_run(inputs, executor, device, one_calls):
    """Levels in tensors are computed on the GPU, in one launch."""
    mean = ["differences", "find_limits", "refine", "weigh", "list_references", "weighted_sum"]
    z = torch.full((B,), 2.0, device=device)
    for name in FUNCTIONS:
        for rows in (False, True):
            executor.names()
            call(name, inputs(), *((z, z / 2, 2 * z) if rows else ()))
            expected = {
                "field_fn": ["expand_level", *mean, "merge_difference", "normalised_field"],
                "posterior_mean": ["expand_level", *mean, "merge"],
            }.get(name, ["find_step_levels", "ode_step"] if rows else ["ode_step"])
            assert executor.names() == expected
    assert all(one_calls)


def test_nothing_waits_for_the_gpu(inputs, device):
    if device.type != "cuda":
        pytest.skip("only a GPU can be waited for")
    values, z = inputs(), torch.full((B,), 2.0, device=device)
    z_next, z_previous = z / 2, 2 * z
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in FUNCTIONS:
            call(name, values, z, z_next, z_previous)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_levels_in_tensors_give_what_the_operators_give(
    inputs, device, by_operators, one_calls, name, bad
):
    values = inputs()
    for key in ("z", "z_next", "z_previous"):
        forms = levels("float64", (3,), device)
        forms[key][2] = bad
        results = call(name, values, **forms)
        expected = by_operators(lambda forms=forms: call(name, values, **forms))
        for value, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=3e-7, atol=1e-6, equal_nan=True)
            assert value[[0, 1, 3, 4]].isfinite().all()
    assert any(one_calls)


def test_a_previous_level_equal_to_the_level(inputs, device):
    """The result is NaN or infinite, in that row."""
    forms = levels("float32", (3,), device)
    forms["z_previous"][2] = forms["z"][2]
    result, _ = call("multistep_step", inputs(), **forms)
    assert not result[2].isfinite().any()
    assert result[[0, 1, 3, 4]].isfinite().all()


def test_values_that_are_not_finite_stay_in_their_row(inputs, one_calls):
    values = inputs()
    values[0][2, 1] = math.nan
    for name in ("field_fn", "posterior_mean"):
        mean = call(name, values)[0]
        assert mean[2].isnan().all()
        assert mean[[0, 1, 3, 4]].isfinite().all()
    assert one_calls == [True, True]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_debug_checks_take_the_operators(inputs, device, one_calls, name):
    values = inputs()
    with pfgm.debug_checks():
        call(name, values)
        with pytest.raises(ValueError, match=r"got -1\.0"):
            call(name, values, torch.full((B,), -1.0, device=device))
    assert one_calls == [False, False]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_takes_the_operators(inputs, one_calls, name):
    """No points, float64, which is refused, and a set, whose chunks have results of their own."""
    assert call(name, inputs(0))[0].shape == (0, 3)
    with pytest.raises(pfgm.backends.Unavailable, match="float32 on a GPU"):
        call(name, inputs(dtype=torch.float64))
    assert one_calls == [False, False]
    if name not in STEPS:
        x, references, *others = inputs()
        call(name, (x, pfgm.ReferenceSet(references), *others))
        assert one_calls == [False, False, False]


@pytest.mark.parametrize(
    "changed",
    [
        {"z": -1.0},
        {"z": math.nan},
        {"z_next": -1},
        {"z_previous": 2.0},
        {"z": "rows"},
        {"z": "bool"},
        {"z": "(1, B)"},
        {"z": None},
        {"gamma": -1.0},
        {"gamma": math.inf},
        {"substitution": "fast"},
        {"D": 0.0},
        {"backend": "fast"},
        {"x": "shape"},
        {"x": "int"},
        {"x": "list"},
        {"references": "shape"},
        {"references": "none"},
        {"references": "int"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_those_of_the_operators(inputs, device, by_operators, name, changed):
    values, options = inputs(), dict(changed)
    x, references = values[:2]
    values[0] = {"shape": x[:, :2], "int": x.int(), "list": x.tolist()}.get(
        options.pop("x", None), x
    )
    values[1] = {
        "shape": references[:, :2], "none": references[:0], "int": references.int(),
    }.get(options.pop("references", None), references)  # fmt: skip
    tensors = {
        "rows": torch.ones(B - 1, device=device),
        "bool": torch.ones(B, dtype=torch.bool, device=device),
        "(1, B)": torch.ones(1, B, device=device),
    }
    options = {key: tensors.get(value, value) for key, value in options.items()}

    def outcome():
        try:
            return call(name, values, **options)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            return type(error), str(error)

    results, expected = outcome(), by_operators(outcome)
    if isinstance(expected[0], torch.Tensor):
        assert_same(results, expected)  # the function has no such argument, or allows the value
    else:
        assert results == expected


def test_an_output_that_overlaps_a_level(inputs, device, one_calls):
    """Levels are read before the step is written."""
    x, _, _, slope, field_z, _ = inputs()
    z = torch.linspace(2, 3, B, device=device)
    expected = pfgm.euler_step(x, pfgm.Field(slope, field_z), z, 1.0, backend="native")
    memory = torch.cat([z, torch.zeros(10, device=device)])
    out = memory.view(5, 3)
    pfgm.euler_step(x, pfgm.Field(slope, field_z), memory[:5], 1.0, out=out, backend="native")
    assert torch.equal(out, expected)
    assert one_calls == [True, True]


def test_a_workspace_is_not_used_by_two_calls(inputs, by_operators):
    """Calls one after the other with different sizes; their workspaces may share memory."""
    sizes = [(5, 9), (40, 70), (3, 200), (40, 70)]
    values = [inputs(rows, (33,), references=references) for rows, references in sizes]
    results = [call("field_fn", each) for each in values]
    expected = by_operators(lambda: [call("field_fn", each) for each in values])
    for one, wanted in zip(results, expected, strict=True):
        assert_same(one, wanted)


def test_support_is_asked_once(inputs, monkeypatch, one_calls):
    values, asked = inputs(), []
    supports = native.supports
    monkeypatch.setattr(native, "supports", lambda *case: asked.append(case) or supports(*case))
    native_calls._supported.clear()
    for _ in range(3):
        call("field_fn", values)
    assert one_calls == [True] * 3
    assert len(asked) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_device_than_the_current_one(inputs, by_operators, one_calls, name):
    values = [value.to("cuda:1") for value in inputs()]
    results = call(name, values)
    assert torch.cuda.current_device() == 0
    assert one_calls == [True]
    assert_same(results, by_operators(lambda: call(name, values)))
    on_the_first = values[1].to("cuda:0")
    with pytest.raises(ValueError, match="must be on one device"):
        pfgm.field_fn(values[0], 2.0, on_the_first, backend="native")
