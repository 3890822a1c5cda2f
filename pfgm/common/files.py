"""Files that are whole or not there, and output folders that are known to work before the work."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

StrPath = str | os.PathLike[str]

# What platforms and file systems say that cannot open or synchronise a folder.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


def write_atomic(path: StrPath, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that ``path`` holds the old content or all of the new, never a part of it.

    The content goes to a temporary file in the same folder (``.pfgm-*.tmp``, which only a killed
    process leaves behind), is flushed to the disk and renamed over ``path``. A symbolic link is
    followed. The mode is what ``open(path, "wb")`` would give: that of the file replaced, or else
    what the umask leaves of 0o666.

    Args:
        path: the file to write; its folder must exist.
        write: called once with an open binary file, which it leaves open. What it raises is raised
            here, with ``path`` left as it was; only an OSError is reworded to name ``path``.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or ``path`` is a folder
            or another thing that is not a regular file.

    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "greeting.txt"
    >>> write_atomic(path, lambda file: file.write(b"hello"))
    >>> path.read_text()
    'hello'
    >>> folder.cleanup()
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OSError(f"{path} cannot be written: {target.parent} is not an existing folder.")
    if target.exists() and not target.is_file():
        raise OSError(f"{path} cannot be written: it exists and is not a regular file.")
    reserve_standard_descriptors()
    try:
        _write_and_rename(target, write)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


def check_folder(path: StrPath) -> Path:
    """Makes sure of an output folder before long work starts: creates it and tries it out.

    A file is created in it and removed, because permission bits alone tell little: not to root,
    nor on a read-only or a network file system.

    Args:
        path: the folder; it and its parents are created where missing.

    Returns:
        The folder as a Path.

    Raises:
        ValueError: the name is empty.
        OSError: it can be neither found nor created, or no file can be created in it.

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     check_folder(Path(parent) / "runs" / "first").is_dir()
    True
    """
    folder = named_folder(path)
    with usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".pfgm-", suffix=".tmp"):
            pass
    return folder


def named_folder(path: StrPath) -> Path:
    """The folder as a Path, which would take the empty name for the current folder.

    Raises:
        ValueError: the name is empty.
    """
    if not os.fspath(path):
        raise ValueError("the output folder is ''; allowed is a name that is not empty.")
    return Path(path)


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Says in one sentence that an output folder does not do, where that makes an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder} cannot be used as the output folder ({error.strerror or error}); allowed is "
            "a folder that exists or can be created, and in which files can be created."
        ) from error


@contextmanager
def output_folder(path: StrPath) -> Iterator[Path]:
    """:func:`check_folder` around some work; where that fails, it leaves no empty new folder.

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     folder = Path(parent) / "runs" / "first"
    ...     try:
    ...         with output_folder(folder):
    ...             raise ValueError("steps is 0")
    ...     except ValueError:
    ...         folder.parent.exists()
    False
    """
    with unless_it_fails(named_folder(path)):
        yield check_folder(path)


@contextmanager
def unless_it_fails(folder: Path) -> Iterator[None]:
    """Keeps the folders that some work creates, this one and its parents, unless the work fails.

    Then those are removed that were not there before and hold nothing.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # one that holds something, or was not made
            for path in new:
                path.rmdir()
        raise


def reserve_standard_descriptors() -> None:
    """Opens /dev/null in the place of stdin, stdout and stderr where they are closed.

    A file that were opened there instead, such as a checkpoint, would be sent the messages of
    libraries that write to descriptor 2.
    """
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            if opened == standard:
                os.set_inheritable(opened, True)
            else:
                os.close(opened)  # another thread was faster


def remove_leftovers(folder: StrPath) -> None:
    """Removes temporary files that killed processes have left; nobody else may write there."""
    for path in Path(folder).glob(".pfgm-*.tmp"):
        path.unlink(missing_ok=True)


def _write_and_rename(target: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = target.parent / f".pfgm-{secrets.token_hex(8)}.tmp"
    try:
        # Not by the tempfile module, whose files are private whatever the umask.
        with open(temporary, "xb") as file:
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o777)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where folders can be opened and synchronised."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
