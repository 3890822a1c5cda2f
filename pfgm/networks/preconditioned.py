"""EDM's preconditioning of a denoiser."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..common.checks import shape_or_type
from ..common.numbers import positive
from ..common.tensors import over_samples, per_row

INSTEAD = (
    " Networks of the field, such as pfgm.networks.UNet, are for PoissonFlow; flow.network makes a "
    "denoiser of their kind."
)
"""What to do where a network of the field stands in the place of a denoiser."""


class Preconditioned(nn.Module):
    """A denoiser net(x, sigma, **cond) from any backbone F(x, c_noise, **cond) (EDM, section 5).

        mean = c_skip(σ) x + c_out(σ) F(c_in(σ) x, c_noise(σ))
        c_skip = σ_d²/(σ² + σ_d²),  c_out = σ σ_d/√(σ² + σ_d²)
        c_in = 1/√(σ² + σ_d²),      c_noise = ln(σ)/4

    sigma is (B,), or (B, 1, …, 1) as in code for EDM. The backbone maps (B, *S) and (B,) to
    (B, *S). Its input and its target have unit variance.
    """

    def __init__(self, backbone: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        if hasattr(backbone, "sigma_data"):
            raise ValueError(
                f"backbone must not be a {type(backbone).__name__}, which is a denoiser with EDM's "
                "preconditioning already; use it as it is."
            )
        self.backbone = backbone
        self.sigma_data = positive("sigma_data", sigma_data)

    def forward(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        sigma = per_row(sigma, x, "sigma")
        noise = sigma.log() / 4
        predicted = self.backbone(self.scaled(x, sigma), noise, **condition)
        if not isinstance(predicted, Tensor) or predicted.shape != x.shape:
            raise ValueError(
                f"backbone must return a tensor of the shape of x, {tuple(x.shape)}, got "
                f"{shape_or_type(predicted)}.{INSTEAD}"
            )
        return self.mean(x, sigma, predicted.to(x.dtype))

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """c_in(σ) x, the input of the backbone for x (B, *S) at sigma (B,)."""
        return x * self._total(over_samples(sigma, x).to(x.dtype)).rsqrt()

    def mean(self, x: Tensor, sigma: Tensor, predicted: Tensor) -> Tensor:
        """c_skip(σ) x + c_out(σ) F, where F (B, *S) is the output of the backbone."""
        kept, _, factor = self.coefficients(over_samples(sigma, x).to(x.dtype))
        return kept * x + factor * predicted

    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """c_skip(σ), 1 − c_skip(σ) and c_out(σ).

        Near the mean, compute x − mean as (1 − c_skip) x − c_out F, which does not cancel.
        """
        total = self._total(sigma)
        factor = sigma * self.sigma_data * total.rsqrt()
        return self.sigma_data**2 / total, sigma.square() / total, factor

    def _total(self, sigma: Tensor) -> Tensor:
        return sigma.square() + self.sigma_data**2
