"""Nothing of the user's changes: not a bit of the training, nothing global."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helpers.running import run_script
from helpers.training import DECAYING_OPTIMIZERS, all_after_training, off, on_and_off_again
from helpers.weights import assert_same


@pytest.mark.parametrize("change", [off, on_and_off_again])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("optimizer", DECAYING_OPTIMIZERS)
def test_switched_off_or_detached_is_bit_identical_to_the_bare_model(
    optimizer: str, precision: str, dropout: float, change: Callable[[Any], Any]
) -> None:
    bare = all_after_training(lambda model: model, optimizer, precision, dropout)
    changed = all_after_training(change, optimizer, precision, dropout)
    assert_same(changed, bare)


@pytest.mark.slow
def test_nothing_global_changes() -> None:
    result = run_script("unchanged.py")
    assert result.stdout.startswith("nothing changed in"), result.stdout + result.stderr[-2000:]
