"""What holds for every test."""

from __future__ import annotations

import gc
import os

# before torch is imported: the tests' tensors are small, a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what runs examples and studies: all of benchmarks/ but what reads records."""
    for item in items:
        if item.path.parent.name == "benchmarks" and item.path.stem != "test_results":
            item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Don't look through what the imports left: two million objects, in each collection."""
    gc.collect()
    gc.freeze()
