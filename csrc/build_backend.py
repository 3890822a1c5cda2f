"""The build backend of pyproject.toml: setuptools, and nvcc from pip where the build needs it."""

from __future__ import annotations

from typing import Any

from nvcc import requirements
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *requirements()]
