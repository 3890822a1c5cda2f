"""Schedulers and a pipeline that let the networks and loops of diffusers use Poisson flows.

    scheduler = PoissonFlowPPScheduler.from_flow(flow)
    images = PoissonFlowPipeline(unet, scheduler)(batch_size=16).images

The pipeline runs this loop, which may also be written out:

    scheduler.set_timesteps(18)
    x = scheduler.prior(16)
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x).prev_sample

It takes the same steps as ``flow.sample(flow.network(unet), 16, ...)``. One thing differs for
a PoissonFlow with a spread: ``flow.sample`` evaluates the network at norms of at most upper_norm,
while here the network sees the points as they are.

:meth:`pfgm.Flow.network` makes networks of this library from those of diffusers. The
schedulers use it to interpret the network's output.
"""

try:
    # A pipeline is loaded only if the module of each part has the base class of diffusers too.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pfgm.integrations.diffusers needs diffusers; in a checkout: pip install '.[diffusers]'"
    ) from error

from .flow_scheduler import FlowScheduler, PoissonFlowSchedulerOutput
from .pipeline import PoissonFlowPipeline
from .schedulers import PoissonFlowPPScheduler, PoissonFlowScheduler

__all__ = [
    "FlowScheduler",
    "PoissonFlowPPScheduler",
    "PoissonFlowPipeline",
    "PoissonFlowScheduler",
    "PoissonFlowSchedulerOutput",
]

# A saved pipeline names the modules of its parts. The name of this package will stay.
for _part in (PoissonFlowPipeline, PoissonFlowScheduler, PoissonFlowPPScheduler):
    _part.__module__ = __name__
