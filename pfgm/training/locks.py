"""One run at a time in a folder: a lock that the kernel releases when its process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..common.files import (
    StrPath,
    check_folder,
    folder_errors,
    folder_path,
    remove_new_folders_on_failure,
)
from .processes import Processes, ProcessLost

__all__ = ["FolderInUse", "claimed", "locked"]

_NAME = ".pfgm.lock"
# What file systems say that have no locks, such as Lustre without its option flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_TRIES, _PAUSE = 10, 0.1  # in a pause of these seconds, one that has just begun signs its lock

# A forked child shares the lock of its parent until it closes the file, so it closes it at once:
# a worker that outlives the run must not hold it.
_mutex = threading.RLock()
_open_files: set[int] = set()
_owners: dict[str, int] = {}  # folder → thread that works in it


class FolderInUse(OSError):
    """Another run is at work in the folder."""


@contextmanager
def claimed(folder: StrPath | None, processes: Processes) -> Iterator[None]:
    """The lock of a run's folder, which the first of its processes takes for all; None is no lock.

    Raises:
        FolderInUse, OSError, ValueError: in the first process, as :func:`locked`.
        ProcessLost: in the others, when the first does not get the lock.
    """
    with ExitStack() as stack:
        problem: Exception | None = None
        if folder is not None and processes.leads:
            try:
                stack.enter_context(locked(folder))
            except Exception as error:
                problem = error
        if processes.any(problem is not None):
            raise problem or ProcessLost(
                "the first process of the run cannot work in its folder, and says why."
            )
        yield


@contextmanager
def locked(folder: StrPath) -> Iterator[Path]:
    """Keeps other runs out of a folder, which is created where missing, as long as work goes on.

    The lock is the kernel's (flock) on the file ``.pfgm.lock``, which holds the holder's name and
    is removed in the end. It ends with its process, however that ends, and forked processes do not
    share it. The thread that holds it may take it again. Nothing in the folder but that file is
    touched before the lock is there. A file system without locks gets a warning, and no lock.

    Yields:
        The folder. Where the work fails, it leaves no empty new folder.

    Raises:
        FolderInUse: another process or thread works there; the message says which, and since when.
        ValueError: the name is empty.
        OSError: as :func:`pfgm.common.files.check_folder`.
    """
    path = folder_path(folder)
    key = os.path.realpath(path)
    if _owners.get(key) == threading.get_ident():
        yield path
        return
    with remove_new_folders_on_failure(path):
        file = _take(path)
        _owners[key] = threading.get_ident()
        try:
            yield check_folder(path)
        finally:
            _owners.pop(key, None)
            _release(file, path / _NAME)


def _take(folder: Path) -> int:
    """An open file that holds the lock."""
    holder = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        with folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = _open(folder / _NAME)
            except FileNotFoundError:
                continue  # a run that failed has just removed its folder
            try:
                if _tried(file, folder / _NAME):
                    return file
                holder = _holder(file)
            except BaseException:
                _close(file)
                raise
            _close(file)
        if attempt and holder is not None:
            break
    raise FolderInUse(
        f"the output folder is {folder}, in which {holder or 'another run'} is at work; allowed is "
        "a folder in which no other run is."
    )


def _tried(file: int, path: Path) -> bool:
    """Locks the file, if nobody has it and it is still the one at the path, and signs it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {path.parent} has no locks ({error.strerror}): nothing keeps a "
            "second run out of the folder.",
            stacklevel=2,
        )
    if not _is_at(file, path):
        return False
    name = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(name).encode(), 0)
    return True


def _holder(file: int) -> str | None:
    """Who has signed the file; None where that is nobody, or a process that was killed."""
    try:
        name = json.loads(os.pread(file, 1000, 0))
        process, host, since = int(name["process"]), str(name["host"]), str(name["since"])
    except (ValueError, KeyError, TypeError):
        return None
    if host == socket.gethostname() and not _lives(process):
        return None
    return f"process {process} on {host} (since {since})"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # of another user
    return True


def _open(path: Path) -> int:
    # Not truncated: it may hold the name of another.
    with _mutex:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open_files.add(file)
    return file


def _close(file: int) -> None:
    with _mutex:
        if file in _open_files:
            _open_files.remove(file)
            os.close(file)


def _release(file: int, path: Path) -> None:
    with suppress(OSError):  # the lock ends without that too
        if _is_at(file, path):
            path.unlink()
    _close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at the path: its holder removes it in the end."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _forget() -> None:
    for file in _open_files:
        os.close(file)
    _open_files.clear()
    _owners.clear()
    _mutex.release()


os.register_at_fork(before=_mutex.acquire, after_in_parent=_mutex.release, after_in_child=_forget)
