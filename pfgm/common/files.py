"""Atomic writing of files, and checks of output folders."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

StrPath = str | os.PathLike[str]

MALFORMED = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError),
    *(ValueError, struct.error, zipfile.BadZipFile),
)
"""The errors that truncated, damaged or crafted content can raise while it is read."""

# Error codes of systems that cannot open or synchronise a folder.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Error codes of file systems without locks, such as Lustre without its option flock."""


def write_atomic(path: StrPath, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that ``path`` holds either the old content or all of the new content.

    The content is written to a temporary file ``.pfgm-*.tmp`` in the same folder, flushed to the
    disk and renamed to ``path``. The temporary file stays only if the process is killed
    (:func:`remove_leftovers`). A symbolic link is followed. The file mode is the one that
    ``open(path, "wb")`` would give: the mode of the replaced file, or else 0o666 without the bits
    of the umask.

    Args:
        path: the file to write; its folder must exist.
        write: called once with an open binary file, which it must not close. If it raises an error,
            ``path`` is left as it was. The error is raised unchanged, but an OSError is reworded to
            name ``path``.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or ``path`` exists and is
            not a regular file.
    """
    if not os.fspath(path):
        raise OSError("the path must not be empty.")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OSError(f"{path} cannot be written: {target.parent} is not an existing folder.")
    if target.exists() and not target.is_file():
        raise OSError(f"{path} cannot be written: it exists and is not a regular file.")
    reserve_standard_descriptors()
    with write_errors(path):
        _write_and_rename(target, write)


def write_json(path: StrPath, content: object, *, allow_nan: bool = True) -> None:
    """Writes content as JSON in lines, with :func:`write_atomic`."""
    text = json.dumps(content, indent=2, allow_nan=allow_nan) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def csv_text(rows: Iterable[Iterable[object]], separator: str = ",") -> str:
    """Rows as the text of a CSV file; the first has the names of the columns."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_csv(path: StrPath, rows: Iterable[Iterable[object]]) -> None:
    """Writes :func:`csv_text` with :func:`write_atomic`. Raises OSError as that does."""
    text = csv_text(rows)
    write_atomic(path, lambda file: file.write(text.encode()))


def check_folder(path: StrPath) -> Path:
    """Creates an output folder and its parents, and checks that files can be created in it.

    The check creates a file and removes it. Permission bits are not enough: they do not apply to
    root, nor to read-only and network file systems.
    """
    folder = folder_path(path)
    with folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_file(folder):
            pass
    return folder


def folder_path(path: StrPath) -> Path:
    """The folder as a Path. Raises ValueError for an empty name, which would be the current one."""
    if not os.fspath(path):
        raise ValueError("the name of the folder must not be empty.")
    return Path(path)


def absolute_path(path: StrPath) -> Path:
    """The path, which starts in the current folder if it is relative.

    A link at its end stays, because the suffix of its name tells the kind of the file.

    >>> absolute_path("net.npy") == Path.cwd() / "net.npy"
    True
    """
    path = Path(path)
    return path if path.is_absolute() else path.parent.resolve() / path.name


@contextmanager
def write_errors(path: StrPath) -> Iterator[None]:
    """Rewords an OSError in the block to name the file, as the error of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Rewords an OSError in the block to say that the output folder cannot be used."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder} cannot be used as the output folder ({error.strerror}); give a "
            "folder that exists or can be created, and in which you may create files."
        ) from error


@contextmanager
def output_folder(path: StrPath) -> Iterator[Path]:
    """Runs :func:`check_folder` before a block. If this fails, empty new folders are removed."""
    with remove_new_folders_on_failure(folder_path(path)):
        yield check_folder(path)


@contextmanager
def new_folder(path: StrPath) -> Iterator[Path]:
    """A folder to fill in a block, whose files appear at ``path`` when the block is done.

    Until then it is a temporary folder ``.pfgm-*.tmp``: inside ``path`` if that is an empty folder,
    else beside it. If the block fails, nothing appears. The temporary folder stays only if the
    process is killed, and then until the next call for the same place (:func:`remove_leftovers`).

    Raises:
        ValueError: ``path`` exists and is not an empty folder.
        OSError: the folder cannot be created; its parent must exist. Or a file cannot be written,
            for example because the disk is full; the message names ``path``.
    """
    check_new_folder(path)
    target = Path(os.path.realpath(path))
    exists = target.is_dir()
    place = target if exists else target.parent
    remove_leftovers(place)
    with folder_errors(target):
        temporary, lock = _create_temporary(place, _make_folder)
    try:
        yield temporary
        with folder_errors(target):
            if exists:  # it may be a mount point, which cannot be replaced
                for file in temporary.iterdir():
                    file.rename(target / file.name)
                temporary.rmdir()
            else:
                temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and _is_of_a_write(error, temporary):
            raise OSError(f"{path} cannot be written: {error.strerror}.") from error
        raise
    finally:
        os.close(lock)
    with write_errors(path):
        _sync_folder(place)


def _is_of_a_write(error: OSError, folder: Path) -> bool:
    """Whether the system raised an error for a file of the folder; writing names no file."""
    named = error.filename is None or str(error.filename).startswith(str(folder))
    return error.errno is not None and named


def check_new_folder(path: StrPath) -> None:
    """Raises ValueError unless there is nothing at ``path``, or an empty folder.

    What a killed process has left of :func:`new_folder` in the folder is removed.
    """
    place = folder_path(path)
    remove_leftovers(place)
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        kind = "a folder that is not empty" if place.is_dir() else "a file"
        raise ValueError(f"the output folder must be new or empty, got {place}, {kind}.")


@contextmanager
def remove_new_folders_on_failure(folder: Path) -> Iterator[None]:
    """If the block fails, removes this folder and those of its parents that are new and empty."""
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the folder is not empty, or was not created
            for path in new:
                path.rmdir()
        raise


def reserve_standard_descriptors() -> None:
    """Opens /dev/null in place of each of stdin, stdout and stderr that is closed.

    Otherwise the next file to be opened, such as a checkpoint, could get descriptor 2, and
    libraries that print errors would write into it.
    """
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
            if opened == standard:
                os.set_inheritable(opened, True)
            else:
                os.close(opened)  # another thread has taken the standard descriptor


def remove_leftovers(folder: StrPath) -> None:
    """Removes the temporary files and folders that killed processes have left in a folder.

    Those of running processes stay, because they are locked. So do those that cannot be locked or
    removed, which do no harm.
    """
    for path in Path(folder).glob(".pfgm-*.tmp"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
                shutil.rmtree(path) if is_folder else path.unlink()
            finally:
                os.close(descriptor)


def is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the open file or folder is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _create_temporary(folder: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Creates a temporary file or folder. Its descriptor holds a lock that marks it as in use."""
    while True:
        path = folder / f".pfgm-{os.urandom(8).hex()}.tmp"
        descriptor = create(path)
        try:
            # A shared lock needs no permission to write, which no folder gives.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            taken = is_open_at(descriptor, path)
        except BlockingIOError:
            taken = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            taken = True
        if taken:
            return path, descriptor
        os.close(descriptor)  # remove_leftovers() came between creation and lock; try again


def _make_file(path: Path) -> int:
    # The tempfile module would create a private file, whatever the umask.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


@contextmanager
def _temporary_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new temporary file for a block. Afterwards it is removed unless it was renamed."""
    path, descriptor = _create_temporary(folder, _make_file)
    try:
        # Open for reading too, or numpy.save would write past Python and not say why it failed.
        with open(descriptor, "w+b") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def _write_and_rename(target: Path, write: Callable[[BinaryIO], object]) -> None:
    with _temporary_file(target.parent) as (temporary, file):
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, if folders can be opened and synchronised."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
