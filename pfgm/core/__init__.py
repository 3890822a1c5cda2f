"""The mathematics of the operations, beneath all backends: problems, weights, formulas, merging."""
