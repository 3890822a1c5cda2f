"""One run at a time in a folder."""

import errno
import fcntl
import os
import signal
import socket
import threading
import time

import pytest

from pfgm.common.files import output_folder
from pfgm.training import locks
from pfgm.training.locks import FolderInUse, locked


@pytest.fixture
def processes():
    """processes(work) → the id of a forked process that does the work; killed at the end."""
    started = []

    def start(work):
        process = os.fork()
        if process == 0:
            try:
                work()
            finally:
                os._exit(1)
        started.append(process)
        return process

    yield start
    for process in started:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


def hold(folder, told):
    with locked(folder):
        told.touch()
        time.sleep(60)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_error_for_a_second_process_names_the_holder(tmp_path, processes):
    run, told = tmp_path / "run", tmp_path / "told"
    holder = processes(lambda: hold(run, told))
    wait_for(told)
    before = (run / ".pfgm.lock").read_bytes()
    expected = rf"process {holder} on {socket.gethostname()} \(since \d{{4}}-\d\d-\d\d .* UTC\)"
    for _ in range(3):
        with pytest.raises(FolderInUse, match=expected), locked(run):
            pass
    assert (run / ".pfgm.lock").read_bytes() == before
    assert names(run) == [".pfgm.lock"]


def test_a_killed_holder_and_its_surviving_worker_release_the_lock(tmp_path, processes):
    run, told = tmp_path / "run", tmp_path / "told"

    def with_worker():
        with locked(run):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(1)
            (tmp_path / "worker").write_text(str(worker))
            told.touch()
            time.sleep(60)

    holder = processes(with_worker)
    wait_for(told)
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    worker = int((tmp_path / "worker").read_text())
    try:
        os.kill(worker, 0)  # it is still there
        assert names(run) == [".pfgm.lock"]
        with locked(run):
            assert f'"process": {os.getpid()}' in (run / ".pfgm.lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
    assert names(run) == []


def test_a_child_that_leaves_the_lock_does_not_end_it(tmp_path):
    failed = tmp_path / "failed"
    with locked(tmp_path / "run") as run:
        (file,) = locks._open_files
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(FolderInUse), locked(run):
                    pass
                locks._release(file, run / ".pfgm.lock")
            except BaseException:
                failed.touch()
            os._exit(0)
        os.waitpid(child, 0)
        assert names(run) == [".pfgm.lock"]
        assert not failed.exists()
    assert names(run) == []


def test_only_the_thread_that_holds_the_lock_takes_it_again(tmp_path):
    refused = []

    def other():
        try:
            with locked(tmp_path):
                pass
        except FolderInUse as error:
            refused.append(str(error))

    with locked(tmp_path):
        with locked(str(tmp_path)):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert names(tmp_path) == [".pfgm.lock"]
    assert len(refused) == 1
    assert f"process {os.getpid()}" in refused[0]


def test_an_unsigned_lock_is_not_taken_for_that_of_a_killed_process(
    tmp_path, processes, monkeypatch
):
    dead = processes(lambda: None)
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
    gone = processes(lambda: None)
    monkeypatch.setattr(locks, "_PAUSE", 0.01)
    monkeypatch.setattr(locks, "_is_alive", lambda process: process != gone)
    path = tmp_path / ".pfgm.lock"
    path.write_text(f'{{"process": {gone}, "host": "{socket.gethostname()}", "since": "then"}}')
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderInUse, match="which another run uses"), locked(tmp_path):
            pass
        for content in (b"", b"[1]", b"\xff", b'{"process": "x"}'):
            path.write_bytes(content)
            with pytest.raises(FolderInUse, match="another run"), locked(tmp_path):
                pass


def test_concurrent_requests_never_share_the_lock(tmp_path, processes, monkeypatch):
    run, inside = tmp_path / "run", tmp_path / "inside"
    monkeypatch.setattr(locks, "_PAUSE", 0.001)

    def work(done):
        entered = 0
        while entered < 20:
            try:
                with locked(run):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    inside.unlink()
                    entered += 1
                    if entered % 3 == 0:
                        raise KeyError  # a run that fails removes its folder
            except (FolderInUse, KeyError):
                continue
        done.touch()
        time.sleep(60)

    for number in range(4):
        processes(lambda done=tmp_path / f"done-{number}": work(done))
    for number in range(4):
        wait_for(tmp_path / f"done-{number}")


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path):
        pass
    monkeypatch.setattr(locks, "NO_LOCKS", ())
    message = r"output folder \(Function not implemented\)"
    with pytest.raises(OSError, match=message), locked(tmp_path):
        pass


def test_a_start_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for folder in (tmp_path / "new", tmp_path):
        with (
            pytest.raises(OSError, match=r"cannot be used as the output.*No space"),
            locked(folder),
        ):
            pass
        assert names(tmp_path) == []


@pytest.mark.parametrize("work", [locked, output_folder])
def test_work_that_fails_leaves_no_empty_new_folder(tmp_path, work):
    (tmp_path / "old").mkdir()
    for name in ("new", "new/er", "old", "old/er"):
        with pytest.raises(KeyError), work(tmp_path / name):
            raise KeyError
        assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == []
    with pytest.raises(IsADirectoryError), work(tmp_path / "new" / "er") as folder:
        folder.with_name("kept").touch() or folder.unlink()
    assert names(tmp_path / "new") == ["kept"]
    with work(tmp_path / "done"):
        pass
    assert names(tmp_path / "done") == []
    with pytest.raises(ValueError, match="the name of the folder must not"), work(""):
        pass
