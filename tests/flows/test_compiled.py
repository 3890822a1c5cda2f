"""Training and priors under torch.compile, for more than one batch size."""

import math
from functools import partial

import pytest
import torch

import pfgm
from benchmarks.common.problems import seeded
from pfgm.integrations.flow_matching import PoissonFlowMatcher

DATA = torch.randn(40, 2, generator=seeded(0))
FLOWS = {
    "PoissonFlow": pfgm.PoissonFlow((2,), data_norm=1.0),
    "PoissonFlow-spread": pfgm.PoissonFlow.from_data(DATA),
    "PoissonFlowPP-128": pfgm.PoissonFlowPP((2,), D=128),
    "PoissonFlowPP-inf": pfgm.PoissonFlowPP((2,), D=math.inf),
}
MATCHERS = {
    "matcher-16": PoissonFlowMatcher(D=16, references=DATA),
    "matcher-inf": PoissonFlowMatcher(),
}
# What takes a number of rows.
METHODS = {
    "perturb": lambda flow, n: flow.perturb(DATA[:n]),
    "prior": lambda flow, n: flow.prior(n),
    "loss": lambda flow, n: flow.loss(flow.empirical(DATA), DATA[:n], DATA[:9]),
}
CALLS = {
    f"{name}-{kind}": partial(call, flow)
    for name, call in METHODS.items()
    for kind, flow in FLOWS.items()
} | {
    name: lambda n, matcher=matcher: matcher.sample_location_and_conditional_flow(None, DATA[:n])
    for name, matcher in MATCHERS.items()
}


# Sizes that are symbols from the first call on, for one of each kind of call.
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *((name, None) for name in CALLS),
        *((f"{call}-PoissonFlow-spread", True) for call in ("perturb", "prior", "loss")),
        ("matcher-16", True),
    ],
)
def test_compiled_calls_take_other_batches(name, dynamic):
    """With the results of plain calls: the backend draws the same numbers."""
    torch._dynamo.reset()
    whole = not name.startswith("loss")  # a loss asks what kind of network it has
    compiled = torch.compile(CALLS[name], backend="eager", dynamic=dynamic, fullgraph=whole)
    for n in (8, 5, 7):
        torch.manual_seed(n)
        expected = CALLS[name](n)
        torch.manual_seed(n)
        torch.testing.assert_close(compiled(n), expected)
