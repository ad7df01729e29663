"""What holds for every test."""

from __future__ import annotations

import os

# before torch is imported: the tests' tensors are small, a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same, whichever tests ran before."""
    torch.manual_seed(0)
