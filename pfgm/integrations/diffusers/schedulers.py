"""The schedulers of PFGM and of PFGM++, with their training targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.tensors import dequantise, over_samples
from ...flows.plusplus import PoissonFlowPP
from ...flows.poisson import PoissonFlow
from ...functional import field_fn
from ...functional.field import is_nearer, mean_from
from ...networks.level_encodings import TimestepEncoding
from ...networks.wrapped import WrappedDenoiser
from ...references import References
from .flow_scheduler import FlowScheduler


class PoissonFlowScheduler(FlowScheduler):
    """PFGM (arXiv 2209.11178) for networks of diffusers that predict the field.

    The network has one channel more than the samples. The first channels are field_x, and the mean
    of the last one over the pixels is field_z, as published. The network sees the points as they
    are. prediction_type is "field"; other arguments are those of :class:`FlowScheduler`.

    >>> import pfgm, torch
    >>> flow = pfgm.PoissonFlow((1, 4, 4), data_norm=1.0)
    >>> scheduler = PoissonFlowScheduler.from_flow(flow, solver="heun")
    >>> scheduler.set_timesteps(3)
    >>> scheduler.timesteps.round()
    tensor([1000.,  768.,  768.,  460.,  460.])
    >>> output = torch.zeros(2, 2, 4, 4)  # stands for the output of a network
    >>> scheduler.step(output, scheduler.timesteps[0], scheduler.prior(2)).prev_sample.shape
    torch.Size([2, 1, 4, 4])
    """

    _flow_type = PoissonFlow
    _flow: PoissonFlow
    _predictions = ("field",)

    def _target(
        self,
        x: Tensor,
        z: Tensor,
        original: Tensor,
        references: References | None,
        /,
        **labels: Any,
    ) -> Tensor:
        """The field, (B, C + 1, *S[1:]), with field_z in the last channel at every pixel."""
        if references is None:
            references = original
            if labels["reference_labels"] is None:
                labels["reference_labels"] = labels["labels"]
        field_x, field_z = field_fn(x, z, references, gamma=self._flow.gamma, **labels)
        return torch.cat([field_x, over_samples(field_z, field_x).expand_as(field_x[:, :1])], 1)


class PoissonFlowPPScheduler(FlowScheduler):
    """PFGM++ (arXiv 2302.04265) and diffusion for networks of diffusers.

    Other arguments are those of :class:`FlowScheduler`.

    Args:
        prediction_type: the meaning of the network's output: "residual", the F of EDM's
            preconditioning, "mean", "noise" or "score" (:meth:`pfgm.Flow.network`).
            "sample" and "epsilon" are the names of diffusers for "mean" and "noise".
        variance_preserving: at D = ∞, whether the samples of a loop are x/√(1 + σ²), which is
            nearly standard normal at the first level. Loops that were written for DDPM, such as
            diffusers' ``DDPMPipeline`` and its script ``train_unconditional.py``, then work without
            a change. prediction_type must then be "noise", which it is by default, or "mean".
            ``flow.network`` has the same argument for such a network.

    >>> import pfgm
    >>> flow = pfgm.PoissonFlowPP((1, 4, 4), D=128)
    >>> scheduler = PoissonFlowPPScheduler.from_flow(flow, solver="multistep")
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.round()
    tensor([1000.,  801.,  515.,    0.])
    """

    _flow_type = PoissonFlowPP
    _flow: PoissonFlowPP
    _wrapped: WrappedDenoiser
    _predictions = ("residual", "mean", "noise", "score", "epsilon", "sample")

    @property
    def alphas_cumprod(self) -> Tensor:
        """1/(1 + σ²) at the timesteps 0, 1, …, num_train_timesteps − 1, with level "timestep".

        Training scripts of diffusers weight the loss of "sample" by ᾱ/(1 − ᾱ), which is 1/σ².
        """
        if not isinstance(self._encoding, TimestepEncoding):
            raise AttributeError("alphas_cumprod exists with level 'timestep' only")
        levels = self._encoding.decode(torch.arange(len(self), dtype=torch.float64, device="cpu"))
        return (1 / (1 + levels.square())).float()

    def _target(
        self,
        x: Tensor,
        sigma: Tensor,
        original: Tensor,
        references: References | None,
        /,
        **labels: Any,
    ) -> Tensor:
        """The output (B, *S) that implies the original samples, or the posterior mean."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        kept, dropped, factor = self._wrapped.coefficients(over_samples(sigma.to(x.dtype), x))
        from_points, rest = kept * x, dropped * x
        if references is not None:
            at = {"sigma": sigma, "D": self._flow.D, **labels}
            return mean_from(from_points, rest, x, references, **at) / factor
        mean = dequantise(original, x.dtype)
        near = over_samples(is_nearer(rest, from_points), x)
        return torch.where(near, rest - (x - mean), mean - from_points) / factor
