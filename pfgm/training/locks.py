"""The lock of an output folder, which keeps a second run out of it."""

from __future__ import annotations

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
from typing import NamedTuple

from ..common.files import (
    NO_LOCKS,
    StrPath,
    check_folder,
    folder_errors,
    folder_path,
    is_open_at,
    remove_new_folders_on_failure,
)
from .processes import Processes, ProcessLost

_LOCK_NAME = ".pfgm.lock"
_TRIES = 10
_PAUSE = 0.1  # seconds between tries, enough for a run to sign the lock that it has just taken


class _Owner(NamedTuple):
    """Who holds the lock of a folder."""

    thread: int
    file: int  # the open lock file
    place: os.stat_result  # of the folder


# A forked child holds its parent's lock until it closes the file. It closes the file at once, or a
# worker that outlives the run would keep the lock.
_mutex = threading.RLock()
_open_files: set[int] = set()
_owners: dict[str, _Owner] = {}  # by folder


class FolderInUse(OSError):
    """Another run uses the folder."""


@contextmanager
def locked_for_all(folder: StrPath | None, processes: Processes) -> Iterator[None]:
    """Locks the folder of a run, by its first process for all processes. None locks nothing."""
    with ExitStack() as stack:
        problem: Exception | None = None
        if folder is not None and processes.leads:
            try:
                stack.enter_context(locked(folder))
            except Exception as error:
                problem = error
        if processes.any(problem is not None):
            raise problem or ProcessLost(
                "the first process of the run cannot use the output folder; see its message."
            )
        yield


@contextmanager
def locked(folder: StrPath) -> Iterator[Path]:
    """Keeps other runs out of a folder while the context is open. Creates a missing folder.

    The lock is a kernel lock (flock) on the file ``.pfgm.lock``. The file names the holder and is
    removed at the end. The lock ends with the process, however the process ends, and forked
    processes do not hold it. The thread that holds the lock may take it again. Before the lock is
    taken, no other file in the folder is touched. On a file system without locks there is a warning
    and no lock.

    Yields:
        The folder. A new folder is removed if the work fails and the folder is empty.

    Raises:
        FolderInUse: another run holds the lock.
        FileNotFoundError: the folder that this thread had locked is no longer at its path. What is
            there now is not touched; if nothing is, the block runs first.
    """
    path = folder_path(folder)
    key = os.path.realpath(path)
    owner = _owners.get(key)
    if owner is not None and owner.thread == threading.get_ident():
        unmoved = is_unmoved(path)
        if unmoved or not path.exists():
            yield path
        if not unmoved:
            raise _moved(path)
        return
    with remove_new_folders_on_failure(path):
        file = _take(path)
        try:
            _owners[key] = _Owner(threading.get_ident(), file, os.stat(path))
            yield check_folder(path)
        finally:
            _owners.pop(key, None)
            _release(file, path / _LOCK_NAME)


def is_unmoved(folder: Path) -> bool:
    """Whether the folder that is locked here is still at its path, without another's lock."""
    owner, lock = _owners.get(os.path.realpath(folder)), folder / _LOCK_NAME
    if owner is None or not folder.is_dir():
        return folder.is_dir()
    return os.path.samestat(owner.place, os.stat(folder)) and (
        is_open_at(owner.file, lock) or not lock.exists()
    )


def check_unmoved(folder: Path) -> None:
    """Raises FileNotFoundError unless the folder that is locked here is still at its path."""
    if not is_unmoved(folder):
        raise _moved(folder)


def _moved(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{folder}, the folder of the run, was moved or removed during training; move it after the "
        "run."
    )


def _take(folder: Path) -> int:
    """The descriptor of an open file that holds the lock."""
    holder = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        with folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = _open(folder / _LOCK_NAME)
            except FileNotFoundError:
                continue  # a run that failed has just removed the folder
            try:
                if _try_lock(file, folder / _LOCK_NAME):
                    return file
                holder = _holder(file)
            except BaseException:
                _close(file)
                raise
            _close(file)
        if attempt and holder is not None:
            break
    raise FolderInUse(
        f"the output folder must not be in use by another run, got {folder}, which "
        f"{holder or 'another run'} uses."
    )


def _try_lock(file: int, path: Path) -> bool:
    """Locks and signs the file, unless it is locked or no longer the file at the path."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {path.parent} has no locks ({error.strerror}): a second run "
            "in the folder would not be refused.",
            stacklevel=2,
        )
    if not is_open_at(file, path):  # its previous holder has removed it
        return False
    name = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(name).encode(), 0)
    except OSError:  # the disk is full
        path.unlink(missing_ok=True)
        raise
    return True


def _holder(file: int) -> str | None:
    """The process that has signed the file; None if there is none or it has ended."""
    try:
        name = json.loads(os.pread(file, 1000, 0))
        process, host, since = int(name["process"]), str(name["host"]), str(name["since"])
    except (ValueError, KeyError, TypeError):
        return None
    if host == socket.gethostname() and not _is_alive(process):
        return None
    return f"process {process} on {host} (since {since})"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # a process of another user
    return True


def _open(path: Path) -> int:
    # Not truncated, because it may name another holder.
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
    with suppress(OSError):  # closing the file ends the lock, even if the file stays
        if is_open_at(file, path):
            path.unlink()
    _close(file)


def _close_in_child() -> None:
    for file in _open_files:
        os.close(file)
    _open_files.clear()
    _owners.clear()
    _mutex.release()


os.register_at_fork(
    before=_mutex.acquire, after_in_parent=_mutex.release, after_in_child=_close_in_child
)
