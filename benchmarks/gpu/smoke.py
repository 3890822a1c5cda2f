"""Runs the problems of ``pfgm check`` in one process, for compute-sanitizer, and to see that each
one ends.

    python -m benchmarks.gpu.smoke [--backend native] [--device cuda]

The two largest are left out. With them the problems take every CUDA kernel that can be chosen
(``tests/kernels/launched.py``). Prints a line after each problem, which shows the one that did not
end.
"""

from __future__ import annotations

import torch

from benchmarks.common.commands import new_parser
from pfgm.backends.backend import BACKENDS
from pfgm.backends.trials import TRIALS, Place


def problems(backend: str, device: str) -> list[str]:
    """Their names. Left out are the two largest, streams and graphs."""
    return [
        name
        for name, trial in TRIALS.items()
        if trial.applies(backend, torch.device(device))
        if name.startswith("many sizes") or not (trial.large or trial.gpus)
    ]


def run(backend: str = "native", device: str = "cuda") -> None:
    """Runs all problems."""
    place = Place(BACKENDS[backend], torch.device(device), torch.float32)
    for name in problems(backend, device):
        TRIALS[name].compute(place)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"done: {name}", flush=True)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    run(options.backend, options.device)


if __name__ == "__main__":
    main()
