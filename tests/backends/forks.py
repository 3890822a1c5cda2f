"""Forks while four threads compute: every child computes too, and gets what its parent gets.

Arguments: the number of forks, the most seconds, and for one run after the other the threads of a
call. A child that hangs prints where.
"""

import faulthandler
import os
import sys
import threading
import time

import torch

from benchmarks.common.problems import problem
from pfgm.backends import native
from pfgm.core.problems import PosteriorMean, State, Upstream

COMPUTING = 4
PATIENCE = 60  # seconds for a child, which needs a few milliseconds


def results(x, references, radius):
    """Results of native calls alone, on existing tensors: torch itself is not tested."""
    arguments = PosteriorMean(x, references, radius, 4.0)
    forward = native.posterior_mean(arguments)
    mean, lse, nearest, total = forward
    saved = State(mean, nearest, total), Upstream(mean, lse), (True, True, True)
    return *forward, *native.posterior_mean_backward(arguments, *saved)


def equal(actual, expected):
    return all(map(torch.equal, actual, expected))


def compute(stop, problems):
    while not stop.is_set():
        for tensors in problems:
            results(*tensors)


def child(problems, expected):
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        same = [
            equal(results(*tensors), wanted)
            for tensors, wanted in zip(problems, expected, strict=True)
        ]
        os._exit(0 if all(same) else 3)
    except BaseException as error:
        print(f"the child raised {error!r}", file=sys.stderr, flush=True)
        os._exit(4)


def main(forks, seconds, threads):
    torch.set_num_threads(threads)
    problems = [problem(3, 40, 5), problem(70, 60, 20), problem(50, 40, 600)]
    expected = [results(*tensors) for tensors in problems]
    # More workspace than is kept, so that memory is freed while other threads allocate.
    large = [problem(384, 12, 1000 + 100 * i) for i in range(COMPUTING)]
    stop = threading.Event()
    computing = [
        threading.Thread(target=compute, args=(stop, [tensors]), daemon=True) for tensors in large
    ]
    for thread in computing:
        thread.start()
    end = time.monotonic() + seconds
    done, failed = 0, []
    while done < forks and time.monotonic() < end and not failed:
        started = os.fork()
        if started == 0:
            child(problems, expected)
        _, status = os.waitpid(started, 0)
        if status != 0:
            failed.append(os.waitstatus_to_exitcode(status))
        done += 1
    stop.set()
    for thread in computing:
        thread.join()
    print(f"{done} forks, {len(failed)} failed {failed}")
    return not failed


if __name__ == "__main__":
    forks, seconds, *counts = sys.argv[1:]
    results_of_runs = [main(int(forks), float(seconds), int(threads)) for threads in counts]
    sys.exit(not all(results_of_runs))
