"""``pfgm sample``: draws samples from a model.

It writes an array, a table, a picture or single images.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import data
from ..common.devices import usable_device
from ..common.files import check_new_folder, new_folder, output_folder
from ..common.images import is_image
from ..common.messages import progress_bar
from ..common.numbers import check_seed, whole
from ..data.images import save_image
from ..evaluation import noise_generator
from ..flows.batched_sampling import draw_prior, sample_batches
from ..networks.registry import label_count, label_number
from ..plotting.figures import PICTURES, require_matplotlib
from ..solvers import StepInfo
from ..training.model_files import Loaded
from .options import (
    Count,
    Model,
    Output,
    Progress,
    SamplingOptions,
    check_guidance,
    load_network,
)

_NO_LABEL = "none"
_FRAMES = 24  # the most frames of an animation
_FILES = (".csv", ".npy", *PICTURES)
_DIGITS = 6  # the fewest digits in the names of single images


@dataclass
class Sample:
    """Draw samples from a trained model, yours or one that comes with the package."""

    model: Model[str]
    """The folder of a run, for its newest checkpoint, a .safetensors file or a folder of pfgm.save,
    or the name of a network that comes with the package: avatars, digits or fashion-mnist."""
    out: Output
    """A .npy file (float32, n first), a .csv file of the rows of a table, a .png or .jpg
    picture of all images, or a new folder for single images, 000000.png and so on."""
    n: Count = 64
    """Number of samples."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How and where samples are drawn."""
    label: tuple[str, ...] = ()
    """Labels of the samples, numbers or names, in turn, so that a picture has one in each column;
    none draws without labels. By default all labels of the network."""
    animate: Path | None = None
    """A .gif file of the samples on their field lines from the prior to data, with at most 24 of
    the steps, between which pictures change evenly (images only, at most --batch-size)."""
    seed: int = 0
    """Seed of the prior, and of the noise that some solvers add."""
    progress: Progress = True

    def run(self) -> None:
        self._check()
        device = usable_device(self.sampling.device)
        loaded = load_network(self.model, self.sampling.solver, device)
        flow, table = loaded.flow, loaded.table
        images = is_image(flow.shape)
        files = (".csv", ".npy") if len(flow.shape) == 1 else (".npy",)
        if table is not None and not table.plain:
            files = (".csv",)  # an array has neither the texts nor the units of the table
        if not images and (self.out.suffix not in files or self.animate):
            raise ValueError(
                f"out must end in {' or '.join(files)}, without --animate, for samples of shape "
                f"{flow.shape}, which are not images, got {self.out}."
            )
        if images and self.out.suffix == ".csv":
            raise ValueError(
                "out must be a folder or end in .npy, .png or .jpg for images of shape "
                f"{flow.shape}, got {self.out}."
            )
        if self.out.suffix.lower() in PICTURES or self.animate:
            require_matplotlib()
        with output_folder(self.out.parent):
            labels = self._labels(loaded)
            path: list[tuple[float, Tensor]] = []
            batches = self._draw(loaded, labels, device, path if self.animate else None)
            if self._is_folder():
                self._write_images(batches)
            else:
                self._write(torch.cat(list(batches)), labels, loaded)
            if self.animate is not None:
                self._animate(self.animate, path, labels, loaded)
        print(self.out)

    def _is_folder(self) -> bool:
        return self.out.suffix.lower() not in _FILES

    def _check(self) -> None:
        if self._is_folder():
            if self.out.suffix and not self.out.is_dir():
                raise ValueError(
                    "out must end in .csv, .npy, .png or .jpg, or be a folder, whose name has no "
                    f"dot unless it exists, got {self.out}."
                )
            check_new_folder(self.out)
        elif self.out.is_dir():
            raise ValueError(f"out must be the name of a file, got {self.out}, a folder.")
        batch_size = self.sampling.batch_size
        if self.animate is not None and (self.animate.suffix != ".gif" or self.n > batch_size):
            raise ValueError(
                f"animate must end in .gif, with at most {batch_size} samples, the batch size, got "
                f"{self.animate} with {self.n} samples."
            )
        whole("n", self.n)
        whole("batch-size", batch_size)
        check_seed(self.seed)

    def _draw(
        self,
        model: Loaded,
        labels: Sequence[int],
        device: torch.device,
        path: list[tuple[float, Tensor]] | None,
    ) -> Iterator[Tensor]:
        """The samples, a batch at a time. Sample i has the label i mod the number of labels.

        The levels and points of each step, and of the end, are appended to the path.
        """
        guidance = self.sampling.guidance
        check_guidance(guidance, model.network)
        if guidance not in (None, 1.0) and not labels:
            raise ValueError(
                f"guidance is {guidance}, but label is none, which it would exaggerate; give "
                "labels, or leave --label out for all."
            )
        each = torch.tensor(labels, device="cpu")
        batches = sample_batches(
            *model,
            draw_prior(model.flow, self.n, self.seed),
            batch_size=self.sampling.batch_size,
            device=device,
            labels=each[torch.arange(self.n, device="cpu") % len(each)] if labels else None,
            generator=noise_generator(self.seed, device),
            compute=self.sampling.settle_compute(model, self.n, device),
            # For a folder, a bar counts the images instead.
            progress=self.progress
            and (not self._is_folder() or self.n <= self.sampling.batch_size),
            callback=None if path is None else functools.partial(_record, path),
            **self.sampling.solver_arguments(model.flow),
        )
        for samples, _ in batches:
            if path is not None:
                path.append((0.0, samples.cpu()))
            yield samples

    def _labels(self, loaded: Loaded) -> list[int]:
        """The numbers of the labels; empty for samples without labels."""
        classes, names = label_count(loaded.network), loaded.label_names
        # "none" means no label, unless a label has this name.
        if [*map(str.casefold, self.label)] == [_NO_LABEL] and self.label[0] not in names:
            return []
        if self.label and not classes:
            raise ValueError(
                f"label is {' '.join(self.label)}, but the network was trained without labels; "
                "leave it out."
            )
        return [label_number(label, names, classes) for label in self.label] or list(range(classes))

    def _write(self, samples: Tensor, labels: Sequence[int], loaded: Loaded) -> None:
        if self.out.suffix == ".npy":
            data.save_array(self.out, samples)
            return
        if self.out.suffix == ".csv":
            columns = [f"x{place}" for place in range(samples.shape[1])]
            table = loaded.table or data.Table.numbers(columns)
            each = torch.tensor(labels, device="cpu")
            places = torch.arange(self.n, device="cpu") % max(len(labels), 1)
            table.write(self.out, samples, each[places] if labels else None)
            return
        from ..plotting import image_grid
        from ..plotting.images import label_columns

        image_grid(samples, self.out, **label_columns(labels, loaded.label_names, self.n))

    def _animate(
        self, out: Path, path: list[tuple[float, Tensor]], labels: Sequence[int], loaded: Loaded
    ) -> None:
        from ..plotting import animation
        from ..plotting.images import label_columns

        symbol = "z" if loaded.flow.D == 1 else "σ"
        titles = [*(f"{symbol} = {level:.2g}" for level, _ in path[:-1]), "samples"]
        with output_folder(out.parent):
            animation(
                torch.stack([x for _, x in path]),
                titles,
                out,
                frames=_FRAMES,
                **label_columns(labels, loaded.label_names, self.n),
            )

    def _write_images(self, batches: Iterator[Tensor]) -> None:
        """Writes single images; the folder appears when all of them are written."""
        digits = max(_DIGITS, len(str(self.n - 1)))
        with (
            new_folder(self.out) as folder,
            progress_bar(
                total=self.n, desc="images", unit="image", disable=not self.progress
            ) as bar,
        ):
            images = (image for batch in batches for image in batch)
            for number, image in enumerate(images):
                save_image(folder / f"{number:0{digits}d}.png", image)
                bar.update()


def _record(path: list[tuple[float, Tensor]], info: StepInfo) -> None:
    """The callback that appends the level and the points of a step."""
    path.append((info["z"], info["x"].cpu()))
