"""Atomic writing and the trial of output folders."""

import errno
import fcntl
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pfgm
from pfgm.common import files
from pfgm.data.tables import Table
from pfgm.training.logs import Log

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's special files")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write_bytes(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[None]:
    previous = os.umask(0o027)
    yield
    os.umask(previous)


@given(content=st.binary(max_size=100), before=st.none() | st.binary(max_size=100))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
def test_the_file_holds_what_was_written_and_nothing_else_is_left(
    tmp_path: Path, content: bytes, before: bytes | None
) -> None:
    path = tmp_path / "out.bin"
    path.unlink(missing_ok=True)
    if before is not None:
        path.write_bytes(before)
    files.write_atomic(path, lambda file: file.write(content))
    assert path.read_bytes() == content
    assert names(tmp_path) == ["out.bin"]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_a_writer_that_raises_leaves_all_as_it_was(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    path = tmp_path / "out.bin"
    if existing:
        path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of the new")
        raise error("broken off")

    with pytest.raises(error, match="broken off"):
        files.write_atomic(path, write)
    assert names(tmp_path) == (["out.bin"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


@pytest.mark.usefixtures("umask")
def test_a_new_file_has_the_mode_of_a_plainly_opened_one(tmp_path: Path) -> None:
    (tmp_path / "plain").open("wb").close()
    files.write_atomic(tmp_path / "atomic", lambda file: None)
    assert mode(tmp_path / "atomic") == mode(tmp_path / "plain") == 0o640


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("permissions", [0o600, 0o666, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, permissions: int) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    path.chmod(permissions)
    seen = []
    files.write_atomic(path, lambda file: seen.append(os.fstat(file.fileno()).st_mode & 0o777))
    assert mode(path) == permissions
    assert seen == [permissions], "a private file must be private from the first byte"


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.bin").symlink_to(tmp_path / "real" / "out.bin")
    files.write_atomic(tmp_path / "link.bin", lambda file: file.write(b"new"))
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real" / "out.bin").read_bytes() == b"new"
    assert names(tmp_path / "real") == ["out.bin"]


def test_the_longest_possible_name_works(tmp_path: Path) -> None:
    name = "n" * 255
    files.write_atomic(tmp_path / name, lambda file: file.write(b"new"))
    assert names(tmp_path) == [name]


def full(file: BinaryIO) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nothing(file: BinaryIO) -> None:
    pass


@pytest.mark.parametrize(
    ("path", "write", "reason"),
    [
        ("out.bin", full, "No space left on device."),
        ("missing/out.bin", nothing, "{0}/missing is not an existing folder."),
        ("file/out.bin", nothing, "{0}/file is not an existing folder."),
        ("", nothing, "it exists and is not a regular file."),
        ("pipe", nothing, "it exists and is not a regular file."),
        pytest.param("/proc/self/out.bin", nothing, "No such file or directory.", marks=linux_only),
    ],
)
def test_what_cannot_be_written_is_named_and_stays(
    tmp_path: Path, path: str, write: Callable[[BinaryIO], None], reason: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")  # no device of the system, which a mistake would replace
    with pytest.raises(OSError, match="cannot be written") as caught:
        files.write_atomic(tmp_path / path, write)
    message = f"{tmp_path / path} cannot be written: {reason.format(tmp_path)}"
    assert str(caught.value) == message
    assert names(tmp_path) == ["file", "pipe"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
def test_folders_that_cannot_be_synchronised_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "fsync", fsync_failing_on_folders(code))
    files.write_atomic(tmp_path / "out.bin", lambda file: file.write(b"new"))
    assert (tmp_path / "out.bin").read_bytes() == b"new"


def test_a_folder_that_fails_to_reach_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fsync_failing_on_folders(errno.EIO))
    with pytest.raises(OSError, match=r"out\.bin cannot be written: .*"):
        files.write_atomic(tmp_path / "out.bin", lambda file: None)


def fsync_failing_on_folders(code: int) -> Callable[[int], None]:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    return fsync


def test_check_folder_creates_it_and_leaves_what_it_holds(tmp_path: Path) -> None:
    folder = files.check_folder(tmp_path / "runs" / "first")
    assert folder == tmp_path / "runs" / "first"
    assert names(folder) == []
    (folder / "kept").write_bytes(b"kept")
    assert files.check_folder(str(folder)) == folder
    assert names(folder) == ["kept"]


@pytest.mark.parametrize(
    "below", ["file", "file/runs", "file/runs/first", pytest.param("/proc/self", marks=linux_only)]
)
def test_check_folder_refuses_what_takes_no_files(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = re.escape(str(tmp_path / below))
    with pytest.raises(OSError, match=rf"^{path} cannot be used as the output folder \("):
        files.check_folder(tmp_path / below)


def test_the_empty_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"^the path must not be empty\.$"):
        files.write_atomic("", nothing)
    with pytest.raises(ValueError, match="the name of the folder must not be empty"):
        files.check_folder("")


def test_an_error_that_no_system_has_named_keeps_its_words(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        raise OSError("a network")

    with pytest.raises(OSError, match=r"out\.bin cannot be written: a network\.$"):
        files.write_atomic(tmp_path / "out.bin", write)


def test_a_file_reaches_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    def fsync(descriptor: int) -> None:
        place = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(place.st_mode) else place.st_size)

    def replace(old: Path, new: Path, *, really: Callable[..., None] = os.replace) -> None:
        done.append("name")
        really(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_atomic(tmp_path / "out.bin", lambda file: file.write(b"new"))
    assert done == [3, "name", "folder"]


def test_a_table_is_written_as_its_text(tmp_path: Path) -> None:
    rows = [["a", "b"], [1, "x,y"], [2.5, ""]]
    files.write_csv(tmp_path / "a.csv", rows)
    assert (tmp_path / "a.csv").read_bytes() == b'a,b\n1,"x,y"\n2.5,\n'
    assert files.csv_text(rows, ";") == "a;b\n1;x,y\n2.5;\n"


def test_a_path_without_its_folder_starts_here_and_a_link_at_its_end_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "net.npy").symlink_to(tmp_path / "data.bin")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    assert files.absolute_path("link/net.npy") == tmp_path.resolve() / "real" / "net.npy"
    assert files.absolute_path(str(tmp_path / "link" / "x")) == tmp_path / "link" / "x"


CLOSED = """
import os, sys, importlib.util as u
spec = u.spec_from_file_location("files", sys.argv[1])
files = u.module_from_spec(spec); spec.loader.exec_module(files)
out = sys.argv[2]
for standard in (0, 1, 2):
    os.close(standard)
def write(file):
    os.write(2, b"noise of a library")
    file.write(str([file.fileno() > 2, *(os.get_inheritable(n) for n in range(3))]).encode())
files.write_atomic(out, write)
"""


def test_no_file_is_written_where_libraries_print(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLOSED, files.__file__, str(tmp_path / "out")]
    subprocess.run(command, check=True)
    assert (tmp_path / "out").read_bytes() == b"[True, True, True, True]"


def test_a_descriptor_that_another_thread_has_opened_meanwhile_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, opened = os.fstat, os.listdir("/proc/self/fd")

    def fstat(descriptor: int) -> os.stat_result:
        if descriptor == 1:  # it was closed when this was asked
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    files.reserve_standard_descriptors()
    assert os.listdir("/proc/self/fd") == opened


def test_json_without_nan_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1, 2.5]}, allow_nan=False)
    text = path.read_text()
    assert text == '{\n  "a": [\n    1,\n    2.5\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")}, allow_nan=False)
    assert path.read_text() == text


@pytest.mark.parametrize("named", [False, True])
def test_a_new_folder_on_a_full_disk_is_named(tmp_path: Path, named: bool) -> None:
    full = (errno.ENOSPC, "No space left on device")
    message = rf"^{tmp_path / 'images'} cannot be written: No space left on device\.$"
    with pytest.raises(OSError, match=message), files.new_folder(tmp_path / "images") as folder:
        raise OSError(*full, str(folder / "0.png")) if named else OSError(*full)
    assert not any(tmp_path.iterdir())


def test_a_new_folder_appears_when_it_is_full_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    place = (tmp_path / "empty").stat().st_ino  # it may be a mount point
    opened = os.listdir("/proc/self/fd")
    for name in ("new", "empty"):
        with files.new_folder(tmp_path / name) as folder:
            (folder / "0.png").write_text("0")
            assert not (tmp_path / name / "0.png").exists()
        assert names(tmp_path / name) == ["0.png"]
    assert names(tmp_path) == ["empty", "new"]
    assert (tmp_path / "empty").stat().st_ino == place
    assert os.listdir("/proc/self/fd") == opened


def test_a_new_folder_is_new_or_empty(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, kind in (("full", "a folder that is not empty"), ("file", "a file")):
        message = f"must be new or empty, got {tmp_path / name}, {kind}."
        with pytest.raises(ValueError, match=re.escape(message)), files.new_folder(tmp_path / name):
            pytest.fail("there is something")
    with pytest.raises(ValueError, match="link, a file"):
        files.check_new_folder(tmp_path / "link")
    message = "b cannot be used as the output folder .No such file or directory."
    with pytest.raises(OSError, match=message), files.new_folder(tmp_path / "a" / "b"):
        pytest.fail("there is no place for it")
    assert names(tmp_path) == ["file", "full", "link"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_folder_that_fails_to_reach_the_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        (tmp_path / "images").mkdir()
    monkeypatch.setattr(os, "fsync", fsync_failing_on_folders(errno.EIO))
    message = rf"^{tmp_path / 'images'} cannot be written: Input/output error\.$"
    with pytest.raises(OSError, match=message), files.new_folder(tmp_path / "images") as folder:
        (folder / "0.png").write_text("0")


def test_other_errors_in_a_new_folder_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.new_folder(tmp_path / "images"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(OSError, match=r"^a network$"), files.new_folder(tmp_path / "images"):
        raise OSError("a network")
    with pytest.raises(KeyError, match="a name"), files.new_folder(tmp_path / "images"):
        raise KeyError("a name")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_another_has_filled_meanwhile_stays(tmp_path: Path) -> None:
    def fill_beside(folder: Path) -> None:
        (folder / "0.png").write_text("mine")
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "1.png").write_text("of another")

    message = "images cannot be used as the output folder .Directory not empty."
    with pytest.raises(OSError, match=message), files.new_folder(tmp_path / "images") as folder:
        fill_beside(folder)
    assert names(tmp_path) == ["images"]
    assert names(tmp_path / "images") == ["1.png"]


KILLED = """
import os, sys, importlib.util as u
from pathlib import Path
spec = u.spec_from_file_location("files", sys.argv[1])
files = u.module_from_spec(spec); spec.loader.exec_module(files)
out = Path(sys.argv[2])
with files.new_folder(out) as folder:
    (folder / "0.png").write_text("half")
    files.write_atomic(out.parent / "a.npy", lambda file: (file.write(b"n" * 99999), os._exit(9)))
"""


def killed_while_writing(out: Path) -> None:
    """Leaves what a killed process leaves: a folder for `out` and a file beside it."""
    command = [sys.executable, "-c", KILLED, files.__file__, str(out)]
    assert subprocess.run(command, check=False).returncode == 9


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"old")
    killed_while_writing(tmp_path / "images")
    assert (tmp_path / "a.npy").read_bytes() == b"old"


def test_what_dead_processes_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "images")
    assert len(names(tmp_path)) == 2
    with files.new_folder(tmp_path / "others") as folder:
        (folder / "0.png").write_text("in use")
        assert names(tmp_path) == [folder.name], "a new folder removes what is left beside it"
        killed_while_writing(tmp_path / "images")
        outside = tmp_path / "outside"
        outside.write_text("kept")
        (tmp_path / ".pfgm-link.tmp").symlink_to(outside)

        def write(file: BinaryIO) -> None:
            files.remove_leftovers(tmp_path)
            assert len(names(tmp_path)) == 4
            file.write(b"in use")

        files.write_atomic(tmp_path / "a.npy", write)
    assert names(tmp_path) == [".pfgm-link.tmp", "a.npy", "others", "outside"]
    assert (tmp_path / "a.npy").read_bytes() == b"in use"
    assert names(tmp_path / "others") == ["0.png"]


def test_a_folder_with_leftovers_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    killed_while_writing(tmp_path / "images")
    assert len(names(tmp_path / "images")) == 1
    files.check_new_folder(tmp_path / "images")
    assert names(tmp_path / "images") == []


def test_a_temporary_file_that_is_removed_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def flock(descriptor: int, kind: int) -> None:
        calls.append(kind)
        if len(calls) < 3:
            next(tmp_path.glob(".pfgm-*")).unlink()
        if len(calls) == 1:
            raise BlockingIOError("remove_leftovers() of another process holds it")
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "out.bin").write_bytes(b"old")
    opened = os.listdir("/proc/self/fd")
    files.write_atomic(tmp_path / "out.bin", lambda file: file.write(b"new"))
    assert (tmp_path / "out.bin").read_bytes() == b"new"
    assert len(calls) == 3
    assert os.listdir("/proc/self/fd") == opened


def test_a_lock_that_fails_leaves_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    killed_while_writing(tmp_path / "images")
    opened, left = os.listdir("/proc/self/fd"), names(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == left
    with pytest.raises(OSError, match=r"out\.bin cannot be written: Input/output error\.$"):
        files.write_atomic(tmp_path / "out.bin", nothing)
    assert os.listdir("/proc/self/fd") == opened


def test_a_file_system_without_locks_keeps_what_may_be_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    files.write_atomic(tmp_path / "out.bin", lambda file: files.remove_leftovers(tmp_path))
    assert names(tmp_path) == ["out.bin"]


def test_every_writer_says_why_a_file_cannot_be_written(tmp_path: Path) -> None:
    flow = pfgm.PoissonFlow((300,), data_norm=1.0)
    writers: dict[str, Callable[[Path], object]] = {
        "a.npy": lambda path: pfgm.data.save_array(path, torch.zeros(10_000)),
        "rows.npy": pfgm.ReferenceSet(torch.rand(1000, 10)).save,
        "a.safetensors": lambda path: pfgm.save(path, flow, torch.nn.Linear(300, 300)),
        "a.csv": lambda path: Table.numbers(["a"]).write(path, torch.zeros(10_000, 1)),
        "log.csv": lambda path: Log(path.parent).write(1, {"loss": 1.0, "n" * 5000: 1.0}),
    }
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # fails as on a full disk
        try:
            with pytest.raises(OSError, match=rf"{name} cannot be written: File too large\.$"):
                write(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
