"""Operations on the CPU beside their competitors, timed by pytest-benchmark."""
