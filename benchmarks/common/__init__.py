"""Shared code of the benchmarks: data, ways to compute, timing, tables, the machine."""
