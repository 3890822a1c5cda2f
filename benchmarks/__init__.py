"""What the library is measured with, run from the root of a checkout.

- :mod:`benchmarks.cpu`: operations on the CPU, by pytest-benchmark;
- :mod:`benchmarks.gpu`: operations on a GPU;
- :mod:`benchmarks.codegen`: what the GPU kernels compile to;
- :mod:`benchmarks.machine_code`: predicted times of the GPU kernels;
- :mod:`benchmarks.claims`: the papers' claims;
- :mod:`benchmarks.studies`: single questions, such as quality by solver;
- :mod:`benchmarks.report`: the stored results as tables.

What they share is in :mod:`benchmarks.common`, what they store in ``benchmarks/results``.
"""
