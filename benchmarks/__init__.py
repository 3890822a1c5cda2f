"""The measurements of the library, run from the root of a checkout.

- :mod:`benchmarks.cpu`: operations on the CPU, by pytest-benchmark;
- :mod:`benchmarks.gpu`: the posterior mean on a GPU, by pytest-benchmark;
- :mod:`benchmarks.claims`: the papers' claims;
- :mod:`benchmarks.studies`: single questions, such as quality by solver;
- :mod:`benchmarks.report`: the stored results as tables.

Shared code is in :mod:`benchmarks.common`, stored results in ``benchmarks/results``.
"""
