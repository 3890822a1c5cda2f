"""Steps a second of ``pfgm demo`` on a busy machine, beside those alone with torch's own waiting.

python -m benchmarks.studies.busy --before OTHER/python

Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.common.rows import Row
from benchmarks.common.study import Study, run

TARGETS = {"alone": 0.95, "beside two busy threads": 0.4, "beside a second demo": 0.35}
"""Least speed in each case, in units of the speed alone before."""
_CHOICES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100000))"


def measure(options: argparse.Namespace, seconds: float) -> Row:
    """Speeds in each case, and relative to that alone before."""
    every_thread = {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(os.cpu_count())}
    before = steps_a_second(seconds, python=options.before, environment=every_thread)
    speeds = {"alone": steps_a_second(seconds)}
    with busy_threads(2):
        speeds["beside two busy threads"] = steps_a_second(seconds)
    with demo_started():
        speeds["beside a second demo"] = steps_a_second(seconds)
    ratios = {case: speed / before for case, speed in speeds.items()}
    return {"alone before": before, "steps a second": speeds, "ratios": ratios}


def shown(rows: list[Row]) -> list[Row]:
    """Each case beside its target."""
    ratios = rows[0]["ratios"]
    return [{"case": c, "speed": ratios[c], "target": target} for c, target in TARGETS.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", default=sys.executable, help="Python of the version before")
    parser.add_argument("--seconds", type=float, default=25.0, help="of training, for each speed")


def steps_a_second(
    seconds: float, python: str = sys.executable, environment: dict[str, str] | None = None
) -> float:
    """How many steps of training a demo makes in a second, from its first step on."""
    with demo_started(python, environment) as process:
        started = time.perf_counter()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        passed = time.perf_counter() - started
        output = process.communicate(timeout=60)[0]
    stopped = re.search(r"stopped at step (\d+)", output)
    assert stopped is not None, output
    return int(stopped[1]) / passed


@contextmanager
def demo_started(
    python: str = sys.executable, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A demo that has begun to train, and ends with the block."""
    kept = {name: value for name, value in os.environ.items() if name not in _CHOICES}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        process = subprocess.Popen(
            [python, "-m", "pfgm_command", "demo", "--out", folder, "--steps", "1000000"],
            env=kept | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("training on"):
                print(line, end="")
                break
        yield process


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Single threads that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


STUDY = Study(
    "busy",
    lambda options: [{"seconds": options.seconds}],
    measure,
    shown,
    add_arguments=add_arguments,
)

if __name__ == "__main__":
    run(STUDY, __doc__)
