"""A pipeline of diffusers that samples from Poisson flows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from ...common.checks import check_choice
from ...common.numbers import whole
from .flow_scheduler import FlowScheduler

_OUTPUT_TYPES = ("pil", "np", "pt")

Generators = torch.Generator | Sequence[torch.Generator]


class PoissonFlowPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws images with a network of diffusers and a scheduler of this library.

    It is ``DDPMPipeline`` with another start: the prior of the flow, which is normal only at D = ∞.
    ``save_pretrained`` and ``from_pretrained`` store the network (as safetensors), the flow and all
    settings of the scheduler. diffusers' own ``DiffusionPipeline.from_pretrained`` does not know
    this class, and refuses the folder by naming what reads it.

    Args:
        unet: the network, such as ``UNet2DModel`` or ``DiTTransformer2DModel``.
        scheduler: a :class:`PoissonFlowScheduler` or :class:`PoissonFlowPPScheduler`.

    Raises:
        TypeError: the scheduler is another one, or the network is not one of diffusers.
        ValueError: the samples of the flow are not images of 1 or 3 channels.

    >>> import pfgm
    >>> from diffusers import UNet2DModel
    >>> from pfgm.integrations.diffusers import PoissonFlowPPScheduler
    >>> unet = UNet2DModel(
    ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,),
    ...     norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",),
    ...     up_block_types=("UpBlock2D",),
    ... )
    >>> flow = pfgm.PoissonFlowPP((1, 8, 8), D=128)
    >>> pipeline = PoissonFlowPipeline(unet, PoissonFlowPPScheduler.from_flow(flow))
    >>> pipeline.set_progress_bar_config(disable=True)
    >>> pipeline(batch_size=2, num_inference_steps=3, output_type="np").images.shape
    (2, 8, 8, 1)
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: ModelMixin, scheduler: ConfigMixin) -> None:
        super().__init__()
        if not isinstance(scheduler, FlowScheduler):
            raise TypeError(
                "scheduler must be a PoissonFlowScheduler or a PoissonFlowPPScheduler, got "
                f"{type(scheduler).__name__}."
            )
        if not hasattr(unet, "dtype"):
            raise TypeError(
                f"unet must be a network of diffusers, such as UNet2DModel, got a "
                f"{type(unet).__name__}; flow.sample takes the networks of pfgm."
            )
        shape = scheduler.flow.shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                "the scheduler's flow must have images (C, H, W) with C = 1 or 3, got samples of "
                f"shape {shape}."
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> PoissonFlowPipeline:
        """The pipeline with the unet of another one, such as ``DDPMPipeline``.

        Options are parts, such as scheduler, and those of ``DiffusionPipeline.from_pipe``.
        """
        # diffusers takes a network over only if the annotation names its very class.
        parts = {"unet": pipeline.unet, **options}
        result: PoissonFlowPipeline = super().from_pipe(pipeline, **parts)
        return result

    def to_json_string(self) -> str:
        """The configuration, whose ``_class_name`` says what reads it.

        DiffusionPipeline.from_pretrained says that diffusers has no attribute of this name.
        """
        settings = json.loads(super().to_json_string())
        settings["_class_name"] += f"; {__package__}.{type(self).__name__}.from_pretrained reads it"
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[object]:
        """Images of the flow, with values mapped from [−1, 1] to [0, 1] and clamped.

        Args:
            batch_size: the number of images.
            generator: of the prior; or a list of them, one for each image.
            num_inference_steps: steps of the scheduler's solver; None takes those of the flow.
            output_type: "pil" gives a list of images, "np" an array (B, H, W, C), "pt" a tensor
                (B, C, H, W).
            return_dict: True returns an object with the images as ``images``, False a tuple.
            class_labels: labels (B,), or one for all images, for a network that takes them.

        Raises:
            ValueError: an argument is not allowed.
        """
        check_choice("output_type", output_type, _OUTPUT_TYPES)
        whole("batch_size", batch_size)
        device = self._execution_device
        x = self._prior(batch_size, generator, device)
        condition = {}
        if class_labels is not None:
            condition["class_labels"] = _labels(class_labels, batch_size, device)
        # The timesteps stay on the CPU, where the scheduler compares them without waiting.
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t).to(self.unet.dtype)
            timesteps = t.to(device).expand(batch_size)
            output = self.unet(scaled, timesteps, **condition, return_dict=False)[0]
            x = self.scheduler.step(output.to(x.dtype), t, x).prev_sample
        images = _as_output(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _prior(self, batch_size: int, generator: Generators | None, device: torch.device) -> Tensor:
        """Points (B, C, H, W) to start from, drawn where the generator is."""
        if generator is None or isinstance(generator, torch.Generator):
            prior: Tensor = self.scheduler.prior(batch_size, generator).to(device)
            return prior
        if len(generator) != batch_size:
            raise ValueError(
                f"generator must be one for each of the {batch_size} images, got a list of "
                f"{len(generator)}."
            )
        return torch.cat([self.scheduler.prior(1, each) for each in generator]).to(device)


def _labels(
    class_labels: int | Sequence[int] | Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Labels (B,) on the device."""
    labels = torch.as_tensor(class_labels, device=device)
    if labels.is_floating_point() or labels.shape not in ((), (batch_size,)):
        raise ValueError(
            f"class_labels must be an integer or {batch_size} integers, one for each image, got "
            f"shape {tuple(labels.shape)} and dtype {labels.dtype}."
        )
    return labels.expand(batch_size)


def _as_output(x: Tensor, output_type: str) -> object:
    """Images in [−1, 1] as PIL images, as an array or as a tensor."""
    images = (x / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.cpu().permute(0, 2, 3, 1).float().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array
