"""Networks of published work, and the files that hold their weights."""
