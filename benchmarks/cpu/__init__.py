"""Operations on the CPU beside what they compete with, by pytest-benchmark."""
