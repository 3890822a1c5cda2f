"""Sizes of the operations on rows."""

# Rows that share a program, that fill a power of two and its neighbours, and rows read twice.
SHAPES = [
    (0, 5), (1, 1), (5, 1), (33, 3), (5, 37), (33, 255), (5, 256), (33, 257), (5, 3072),
    (1, 8192), (2, 8193), (1, 20_000),
]  # fmt: skip
