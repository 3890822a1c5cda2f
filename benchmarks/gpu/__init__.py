"""Operations on a GPU: tests, sanitizers and times."""
