"""The image files in a folder or in a zip archive, and their labels.

Labels come from ``dataset.json``, as in the data sets of EDM and StyleGAN, or else from class
folders. Folders train and test, or held-out, hold the two parts of a data set. Nothing is unpacked
to the disk, and a name in an archive is never used as a path.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch
from torch import Tensor

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

_DESCRIPTION = "dataset.json"
_TRAIN, _HELD_OUT = ("train",), {("held-out",), ("held_out",), ("test",)}
_MAX_MEMBER_BYTES = 1 << 28  # of a file in an archive, unpacked
_FOREIGN_FOLDERS = ("__MACOSX",)  # in archives that macOS makes


class ImageFiles(ABC):
    """The images of a folder or an archive, in the order of their relative paths.

    Attributes:
        path: of the folder or the archive.
        names: relative paths of the images with "/", sorted. Hidden files are left out.
    """

    path: Path
    names: list[str]

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Opens a file by its relative path; the caller closes it."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of this relative path."""

    @abstractmethod
    def place(self, name: str) -> str:
        """The name of a file in errors."""

    @abstractmethod
    def close(self) -> None:
        """Closes the archive."""

    def labels(self) -> tuple[int, Tensor | None, tuple[str, ...]]:
        """The number of images that are held out, which come first; labels (n,) and their names.

        Images are held out if all lie in two folders, one of them train and the other held-out,
        held_out or test.
        """
        folders = _below([PurePosixPath(name).parent.parts for name in self.names])
        tops = {folder[:1] for folder in folders}
        held_out = 0
        if _TRAIN in tops and tops & _HELD_OUT:
            if len(tops) > 2:
                names = sorted("".join(top) or "images" for top in tops - {_TRAIN})
                raise ValueError(
                    f"{self.path} must have one folder beside train, held-out, held_out or test, "
                    f"got {' and '.join(names)}."
                )
            held_out = sum(folder[:1] != _TRAIN for folder in folders)
            folders = _below([folder[1:] for folder in folders])
        if self.has(_DESCRIPTION):
            return held_out, self._described_labels(), ()
        if not all(folders):
            return held_out, None, ()  # some images lie in no class folder
        names = [folder[0] for folder in folders]
        if unknown := {*names[:held_out]} - {*names[held_out:]}:
            raise ValueError(
                f"held-out images in {self.path} must be of the classes in train, got "
                f"{min(unknown)}."
            )
        classes = {name: i for i, name in enumerate(sorted({*names}))}
        labels = torch.tensor([classes[name] for name in names], device="cpu")
        return held_out, labels, tuple(classes)

    def _described_labels(self) -> Tensor | None:
        """The labels in dataset.json: {"labels": [[name, label], …]}, or null for none."""
        place = self.place(_DESCRIPTION)
        try:
            with self.open(_DESCRIPTION) as file:
                pairs = json.loads(file.read())["labels"]
            known: dict[str, Any] = {} if pairs is None else dict(pairs)
        except (ValueError, KeyError, TypeError, RecursionError, EOFError, BadZipFile) as error:
            raise ValueError(
                f'{place} must be JSON of the form {{"labels": [[name, label], …]}}, or with null '
                "in place of the list; it is damaged or holds something else."
            ) from error
        if pairs is None:
            return None
        for name in self.names:
            label = known.get(name)
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
                raise ValueError(
                    f"the label of {name} in {place} must be an integer of at least 0, got "
                    f"{str(label)[:40]}."
                )
        return torch.tensor([known[name] for name in self.names], device="cpu")


class FolderFiles(ImageFiles):
    """The images in a folder and its subfolders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = _images(file.relative_to(path).as_posix() for file in _files_below(path))

    def open(self, name: str) -> IO[bytes]:
        return open(self.path / name, "rb")

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def place(self, name: str) -> str:
        return str(self.path / name)

    def close(self) -> None:
        pass


class ZipFiles(ImageFiles):
    """The images in a zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = ZipFile(path)
        except (BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            raise ValueError(
                f"{path} must be a complete zip archive; it is truncated, damaged or another kind "
                "of file."
            ) from error
        self._members: dict[str, ZipInfo] = {}
        for member in self._archive.infolist():
            if member.filename in self._members:
                raise ValueError(
                    f"{path} must hold one file of each name, got {member.filename} twice."
                )
            if not member.is_dir():
                self._members[member.filename] = member
        self.names = _images(iter(self._members))
        for name in (*self.names, _DESCRIPTION):
            if name in self._members:
                self._check(self._members[name])

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(self._members[name])

    def has(self, name: str) -> bool:
        return name in self._members

    def place(self, name: str) -> str:
        return f"{name} in {self.path}"

    def close(self) -> None:
        self._archive.close()

    def _check(self, member: ZipInfo) -> None:
        if member.flag_bits & 1:
            raise ValueError(
                f"{self.place(member.filename)} must not be encrypted; archives with passwords "
                "cannot be read."
            )
        if member.file_size > _MAX_MEMBER_BYTES:
            raise ValueError(
                f"{self.place(member.filename)} must unpack to at most {_MAX_MEMBER_BYTES} bytes, "
                f"got {member.file_size}."
            )


@contextmanager
def image_files(path: Path) -> Iterator[ImageFiles]:
    """The images in a folder or in a zip archive, which is open in the block."""
    files = FolderFiles(path) if path.is_dir() else ZipFiles(path)
    try:
        if not files.names:
            kind = "a folder" if path.is_dir() else "an archive"
            raise ValueError(
                f"{path} must hold at least one file that ends in {', '.join(IMAGE_SUFFIXES[:-1])} "
                f"or {IMAGE_SUFFIXES[-1]}, got {kind} without images."
            )
        yield files
    finally:
        files.close()


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files in a folder and its subfolders, also in linked folders.

    Links to nothing count as files, so that a missing image is an error and not left out. Links
    back to a folder ``above``, by its real path, are left out.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if _is_foreign(entry.name):
                continue
            if entry.is_dir():
                yield from _files_below(path, (*above, here))
            elif entry.is_file() or not path.exists():
                yield path


def _images(names: Iterator[str]) -> list[str]:
    """The names of images among relative paths, sorted."""
    return sorted(name for name in names if _is_image(PurePosixPath(name)))


def _below(folders: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Folders of images, without those that all images have in common."""
    alike = takewhile(lambda names: len({*names}) == 1, zip(*folders, strict=False))
    common = len([*alike])
    return [folder[common:] for folder in folders]


def _is_image(name: PurePosixPath) -> bool:
    folders = [part for part in name.parts if part not in (".", "..")]
    return name.suffix.lower() in IMAGE_SUFFIXES and not any(map(_is_foreign, folders))


def _is_foreign(name: str) -> bool:
    """Whether files and folders of this name are left out."""
    return name.startswith(".") or name in _FOREIGN_FOLDERS
