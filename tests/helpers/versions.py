"""What the oldest versions of torch, lightly and Lightning don't have."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

# where `nox -s oldest` runs; everywhere else nothing is skipped
OLDEST = torch.__version__.startswith("2.6")


def not_the_oldest(lack: str) -> None:
    """Skip a test where the oldest versions run, which lack something themselves."""
    if OLDEST:
        pytest.skip(lack)


def newer(module: str, name: str) -> Any:
    """Give a class that came later than the oldest version, where the test is skipped."""
    found = import_module(module)
    if OLDEST and not hasattr(found, name):
        pytest.skip(f"this {module} has no {name}")
    return getattr(found, name)
