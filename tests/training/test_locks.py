"""One run at a time in a folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time

import pytest

from pfgm.common.files import output_folder
from pfgm.training import locks
from pfgm.training.locks import FolderInUse, check_unmoved, is_unmoved, locked, locked_for_all
from pfgm.training.processes import Processes, ProcessLost


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


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before
    assert not locks._open_files
    assert not locks._owners


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which take no time. pauses.then(work) works in the third."""

    class Pauses(list):
        def then(self, work):
            self.work = work

        def sleep(self, seconds):
            self.append(seconds)
            if len(self) == 3 and hasattr(self, "work"):
                self.work()

    pauses = Pauses()
    monkeypatch.setattr(locks.time, "sleep", pauses.sleep)
    return pauses


def signed(folder, process, host=None):
    """The open lock file of a folder, held here and signed with the name of a process."""
    file = (folder / ".pfgm.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps({"process": process, "host": host or socket.gethostname(), "since": "x"}))
    file.flush()
    return file


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


def test_a_folder_that_another_run_removes_at_each_try(tmp_path, monkeypatch):
    opened = locks._open

    def too_late(path):
        path.parent.rmdir()
        return opened(path)

    monkeypatch.setattr(locks, "_PAUSE", 0)
    monkeypatch.setattr(locks, "_open", too_late)
    run = tmp_path / "run"
    with pytest.raises(FolderInUse, match=f"got {run}, which another run uses"), locked(run):
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


class OneOf(Processes):
    """One process of a run of two, without the other, which may have had a problem."""

    def __init__(self, rank, problem=False):
        self.rank, self.size, self._problem = rank, 2, problem
        self.told = []  # what this process tells the other

    def any(self, flag):
        self.told.append(flag)
        return flag or self._problem


def test_the_first_process_locks_for_all(tmp_path):
    with locked_for_all(tmp_path, OneOf(0)):
        assert names(tmp_path) == [".pfgm.lock"]
    with locked_for_all(tmp_path / "run", OneOf(1)), locked_for_all(None, OneOf(0)):
        assert names(tmp_path) == []


def test_a_folder_that_the_first_process_cannot_lock_ends_all(tmp_path):
    (tmp_path / "file").touch()
    leader = OneOf(0)
    with (
        pytest.raises(OSError, match="used as the output"),
        locked_for_all(tmp_path / "file", leader),
    ):
        pytest.fail("the run began")
    assert leader.told == [True]  # or the other would wait for it
    for first in (0, 1):
        with (
            pytest.raises(ProcessLost, match=r"first process .* its message"),
            locked_for_all(tmp_path / "run", OneOf(first, problem=True)),
        ):
            pytest.fail("the run began")
    assert names(tmp_path) == ["file"]


def test_a_folder_that_was_moved_is_not_taken_again(tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert not is_unmoved(run)
    ran = []
    with locked(run):
        check_unmoved(run)
        run.rename(moved)
        with pytest.raises(FileNotFoundError, match=r"run, .* was moved or removed"), locked(run):
            ran.append("where nothing is")
        run.mkdir()
        with pytest.raises(FileNotFoundError, match="was moved or removed"), locked(run):
            ran.append("in another folder")
        with pytest.raises(FileNotFoundError, match="was moved or removed"):
            check_unmoved(run)
        assert names(run) == []
    assert ran == ["where nothing is"]
    assert is_unmoved(run)  # nobody holds it
    assert names(moved) == [".pfgm.lock"]


def test_the_lock_file_of_another_run_is_noticed_and_stays(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".pfgm.lock").unlink()
        assert is_unmoved(tmp_path)
        (tmp_path / ".pfgm.lock").write_text("of another")
        assert not is_unmoved(tmp_path)
    assert (tmp_path / ".pfgm.lock").read_text() == "of another"


def test_links_lead_to_the_same_lock(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run"), locked(tmp_path / "link"):
        assert is_unmoved(tmp_path / "link")
        assert names(tmp_path / "run") == [".pfgm.lock"]


@pytest.mark.parametrize(
    ("process", "host", "tries"),
    [(1, None, 2), (1 << 40, "elsewhere", 2), (1 << 80, None, 10), (1 << 80, "away", 2)],
)
def test_a_holder_that_lives_is_waited_for_once(tmp_path, pauses, process, host, tries):
    message = f"process {process} on " if tries == 2 else "which another run uses"
    with (
        signed(tmp_path, process, host),
        pytest.raises(FolderInUse, match=message),
        locked(tmp_path),
    ):
        pytest.fail("two runs in a folder")
    assert pauses == [0.1] * (tries - 1)
    assert names(tmp_path) == [".pfgm.lock"]


def test_a_process_of_another_user_lives(tmp_path, pauses, monkeypatch):
    def kill(process, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    with (
        signed(tmp_path, 1 << 20),
        pytest.raises(FolderInUse, match=f"process {1 << 20}"),
        locked(tmp_path),
    ):
        pytest.fail("two runs in a folder")


def test_the_lock_is_taken_as_soon_as_it_is_free(tmp_path, pauses):
    file = signed(tmp_path, 1 << 80, None)
    pauses.then(file.close)
    with locked(tmp_path):
        name = json.loads((tmp_path / ".pfgm.lock").read_text())
    assert len(pauses) == 3
    assert (name["process"], name["host"]) == (os.getpid(), socket.gethostname())
    assert names(tmp_path) == []


def test_a_folder_or_a_lock_that_was_just_removed_is_made_again(tmp_path, pauses, monkeypatch):
    """By a run that has failed: after the folder was made, and after its file was opened."""
    run, real, calls = tmp_path / "run", fcntl.flock, []

    def open_lock(path, *arguments, opened=os.open):
        if path == run / ".pfgm.lock" and not calls:
            calls.append("folder")
            run.rmdir()
        return opened(path, *arguments)

    def flock(file, operation):
        if len(calls) == 1:
            calls.append("file")
            (run / ".pfgm.lock").unlink()
        real(file, operation)

    monkeypatch.setattr(os, "open", open_lock)
    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(run):
        assert names(run) == [".pfgm.lock"]
    assert calls == ["folder", "file"]
    assert pauses == [0.1, 0.1]


def test_a_longer_signature_is_replaced(tmp_path):
    (tmp_path / ".pfgm.lock").write_text("x" * 500)
    with locked(tmp_path):
        assert json.loads((tmp_path / ".pfgm.lock").read_text())["process"] == os.getpid()


def test_no_process_is_forked_while_a_lock_file_opens_or_closes(tmp_path, monkeypatch):
    """A child would hold the lock through a file that it does not know."""
    free = []

    def of_another_thread(function):
        def work(*arguments):
            def take():
                if locks._mutex.acquire(blocking=False):
                    free.append(function.__name__)
                    locks._mutex.release()

            thread = threading.Thread(target=take)
            thread.start()
            thread.join()
            return function(*arguments)

        return work

    path = tmp_path / ".pfgm.lock"
    with monkeypatch.context() as patch:
        for name in ("open", "close"):
            patch.setattr(os, name, of_another_thread(getattr(os, name)))
        locks._close(locks._open(path))
    assert free == []


def test_a_child_of_a_child_keeps_the_files_it_inherits(tmp_path):
    with locked(tmp_path / "run"):
        (number,) = locks._open_files
        child = os.fork()
        if child == 0:
            try:
                os.dup2(
                    os.open(tmp_path, os.O_RDONLY), number
                )  # its own file, numbered as the lock
                grandchild = os.fork()
                if grandchild == 0:
                    os.fstat(number)
                    os._exit(0)
                os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_threads_of_a_forked_process_take_locks(tmp_path):
    with locked(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            done = []

            def work():
                with locked(tmp_path / "other"):
                    done.append(True)

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(20)
            os._exit(0 if done else 1)
        assert os.waitpid(child, 0)[1] == 0
