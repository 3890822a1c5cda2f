"""What several benchmarks use: data, ways to compute, timing, tables, the machine."""
