"""Nothing of the user's changes: not a bit of the training, nothing global."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightly.utils.lars import LARS
from models import tiny_encoder
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from training import Siamese, assert_same, fit, run_script

import recon_aux
from recon_aux.integrations.lightly import attach

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": partial(Adam, lr=1e-2),
    "AdamW": partial(AdamW, lr=1e-2),
    "LARS": partial(LARS, lr=0.05, momentum=0.9, weight_decay=1e-3),
}


def off(model: Any) -> Any:
    return attach(model, weight=0, equivariant_dim=0)


def on_and_off_again(model: Any) -> Any:
    return recon_aux.detach(attach(model))


def trained(
    change: Callable[[Any], Any],
    optimizer: str,
    precision: Any,
    dropout: float,
    accelerator: str = "cpu",
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    encoder = tiny_encoder(dropout=dropout)
    model = Siamese(encoder, configure=lambda model: OPTIMIZERS[optimizer](model.parameters()))
    model = change(model)
    torch.manual_seed(3)
    options = {"precision": precision, "accelerator": accelerator, "max_steps": 5}
    made = fit(model, **options).optimizers[0]
    state = {
        f"{name} {key}": value
        for name, parameter in model.named_parameters()
        for key, value in made.state[parameter].items()
        if isinstance(value, Tensor)
    }
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("recon_aux.")}
    return {**weights, **state, "random": torch.get_rng_state()}


@pytest.mark.parametrize("change", [off, on_and_off_again])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_switched_off_or_detached_is_bit_identical_to_the_bare_model(
    optimizer: str, precision: str, dropout: float, change: Callable[[Any], Any]
) -> None:
    bare = trained(lambda model: model, optimizer, precision, dropout)
    changed = trained(change, optimizer, precision, dropout)
    assert_same(changed, bare)


def test_nothing_global_changes() -> None:
    result = run_script("unchanged.py")
    assert result.stdout.startswith("nothing changed in"), result.stdout + result.stderr[-2000:]
