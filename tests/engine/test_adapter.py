"""An adapter that is written from its page alone attaches a made-up trainer's methods."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import nn

import recon_aux
from helpers.data import batch
from helpers.inside import hooked
from helpers.models import tiny_encoder

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


@pytest.fixture
def page() -> dict[str, Any]:
    """What the page's blocks of code define: a framework, then its adapter."""
    (framework,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    (adapter,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(adapter.splitlines()) < 40
    names: dict[str, Any] = {"torch": torch, "nn": nn, "NTXentLoss": NTXentLoss}
    exec(compile(framework, "framework", "exec"), names)
    exec(compile(adapter, "adapter", "exec"), names)
    return names


def method(page: dict[str, Any], name: str = "SimCLR") -> Any:
    encoder = nn.Sequential(tiny_encoder(), nn.Flatten())
    return type(name, (page["SimCLR"],), {})(encoder, 16)


def test_the_pages_trainer_trains_the_decoder_in_a_group_of_its_own(page: dict[str, Any]) -> None:
    model = page["attach"](method(page), equivariant_dim=4)
    before = model.recon_aux.decoder.queries.clone()
    page["Trainer"]().fit(model, [batch()[0]] * 3)
    assert not torch.equal(before, model.recon_aux.decoder.queries)
    assert [group["name"] for group in model.param_groups()] == [
        "encoder",
        "projector",
        "recon_aux",
    ]
    assert model.recon_aux.weight == 1.0
    assert not hooked(recon_aux.detach(model))


def test_the_pages_conventions_are_followed(page: dict[str, Any]) -> None:
    assert page["attach"](method(page, "Other")).recon_aux.options["weight"] == "auto"
    with pytest.raises(TypeError, match="got MAE, which rebuilds masked patches of one view"):
        page["attach"](method(page, "MAE"))
    headless = method(page)
    headless.neck = headless.projector
    del headless.projector
    with pytest.raises(ValueError, match=r"expected a projection head.* Pass heads=.*neck"):
        page["attach"](headless)
