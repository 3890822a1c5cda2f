"""``pfgm convert``: makes a checkpoint from a published file of PFGM, PFGM++ or EDM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..common.files import output_folder
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..networks import EDMDenoiser, Published, load_published
from ..training.model_files import save
from .options import Output

_CIFAR10 = (3, 32, 32)


@dataclass
class Convert:
    """Make a checkpoint from a published file of PFGM, PFGM++ or EDM."""

    published: tyro.conf.Positional[Path]
    """The file: .pth of PFGM, .pkl or .pt of PFGM++ and EDM. Nothing in it is executed."""
    out: Output
    """The checkpoint to write, a name that ends in .safetensors."""
    ema: bool = True
    """Take the averaged weights, which are the ones to sample with."""
    resolution: int | None = None
    """Height and width of the images, for a file of PFGM whose attention is not at width 16."""
    D: float | None = None
    """Number of augmented dimensions, for a file that does not say it; inf for a file of EDM."""
    M: float | None = None
    """Largest exponent of the perturbation, for a file of PFGM; 291 for CIFAR-10."""
    z_max: float | None = None
    """Level at which sampling starts, for a file of PFGM; by default it follows from M."""
    upper_norm: float | None = None
    """Largest norm of the prior, for a file of PFGM; by default it follows from M."""

    def run(self) -> None:
        self._check()
        network = load_published(self.published, ema=self.ema, resolution=self.resolution)
        flow = self._flow_of(network)
        with output_folder(self.out.parent):
            save(self.out, flow, network, distilled=False)
        classes = network.classes if isinstance(network, EDMDenoiser) else 0
        labels = f"{classes} labels" if classes else "no labels"
        print(f"{self.out}: {type(network).__name__}, samples {network.shape}, {labels}, {flow}")

    def _check(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out must end in .safetensors, got {self.out}.")
        if self.out.is_dir() or os.path.realpath(self.out) == os.path.realpath(self.published):
            raise ValueError(
                f"out must be the name of another file, got {self.out}, a folder or the published "
                "file."
            )

    def _flow_of(self, network: Published | EDMDenoiser) -> Flow:
        """The flow of a published network, from its file and the options.

        A file of PFGM holds nothing of its flow, the others hold D and sigma_data.
        """
        if isinstance(network, EDMDenoiser):
            self._refuse("PFGM++ or EDM", M=self.M, z_max=self.z_max, upper_norm=self.upper_norm)
            D = self._dimensions(network.D)
            return PoissonFlowPP(network.shape, D=D, sigma_data=network.sigma_data)
        self._refuse("PFGM", D=self.D)
        options = {"M": self.M, "z_max": self.z_max, "upper_norm": self.upper_norm}
        chosen: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
        if network.shape == _CIFAR10:
            return PoissonFlow.cifar10(**chosen)
        if self.M is None:
            raise ValueError(
                f"{self.published} holds a network of PFGM for samples {network.shape} and no M; "
                "give the --M that it was trained with (and --z-max and --upper-norm, if they do "
                "not follow from M)."
            )
        return PoissonFlow(network.shape, **chosen)

    def _dimensions(self, stored: float | None) -> float:
        """D of a network: that of the file, or the option."""
        if stored is None and self.D is None:
            raise ValueError(
                f"{self.published} does not say its D; give --D inf for a file of EDM, or the D "
                "that it was published under."
            )
        if stored is not None and self.D not in (None, stored):
            raise ValueError(f"D must be {stored:g}, that of {self.published}, got {self.D:g}.")
        D = self.D if stored is None else stored
        assert D is not None
        return D

    def _refuse(self, kind: str, **options: float | None) -> None:
        for name, value in options.items():
            if value is not None:
                raise ValueError(
                    f"{name} is {value:g}, but {self.published} is a file of {kind}, which has no "
                    f"{name}."
                )
