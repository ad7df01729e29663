"""Losses and weights, as they are and as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def loss_of(result: Any) -> Any:
    """The loss in what a training step returns."""
    return result["loss"] if isinstance(result, dict) else result


def weights_of(model: Any) -> dict[str, Tensor]:
    """All weights of a model, as they are now."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def decoder_of(model: Any) -> dict[str, Tensor]:
    """The weights that we add, as they are now."""
    return weights_of(model.recon_aux)


def assert_trained(model: Any, before: dict[str, Tensor]) -> None:
    """Each of the weights that we add has changed, and is finite."""
    for name, parameter in model.recon_aux.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]), name


def assert_both_trained(model: Any, before: dict[str, Tensor], *others: str) -> None:
    """Weights of the decoder have changed, and the model's own, whatever happened to others."""
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("recon_aux.decoder") for name in changed)
    assert any(not name.startswith(("recon_aux", *others)) for name in changed)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Both have the same names, and by each the same tensor, bit for bit, or the same value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        same = torch.equal(other, value) if isinstance(value, Tensor) else other == value
        assert same, name


def bare_state(model: Any) -> dict[str, Tensor]:
    """A model's state without what we add."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("recon_aux.")}
