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
from recon_aux.engine.adapter import Conventions, decoder_groups

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


def test_the_decoders_group_has_its_own_settings_and_only_what_is_trained(
    page: dict[str, Any],
) -> None:
    settings = {"decoder_lr": 0.3, "decoder_weight_decay": 0.2}
    model = page["attach"](method(page), **settings)
    model.recon_aux.edges.requires_grad_(False)
    (group,) = decoder_groups(model)
    its = {id(p) for p in model.recon_aux.parameters() if p.requires_grad}
    assert {id(p) for p in group.pop("params")} == its
    assert group == {"name": "recon_aux", "lr": 0.3, "weight_decay": 0.2}
    model.recon_aux.requires_grad_(False)
    assert decoder_groups(model) == []
    with pytest.raises(ValueError, match="got a bare SimCLR"):
        decoder_groups(recon_aux.detach(model))


def test_a_given_option_goes_before_the_conventions(page: dict[str, Any]) -> None:
    for weight in (0, 2.0):
        assert page["attach"](method(page), weight=weight).recon_aux.options["weight"] == weight
    model = page["attach"](method(page), heads=[], equivariant_dim=0)
    assert [group["name"] for group in model.param_groups()][-1] == "recon_aux"


def test_a_method_that_extends_a_refused_one_is_refused(page: dict[str, Any]) -> None:
    model = type("MyMAE", (type("MAE", (page["SimCLR"],), {}),), {})(tiny_encoder(), 16)
    with pytest.raises(TypeError, match="got MyMAE, which rebuilds masked patches of one view"):
        page["attach"](model)


def test_an_encoder_of_the_usual_name_goes_before_one_of_a_similar_name(
    page: dict[str, Any],
) -> None:
    model = method(page)
    encoder = model._modules.pop("encoder")
    model.old_encoder, model.encoder = tiny_encoder(), encoder
    page["attach"](model)
    assert hooked(model)[1:] == ["projector", "encoder"]


def test_conventions_know_a_head_by_its_dotted_name() -> None:
    its = Conventions(("trunk",), lambda name, module: name == "online.neck", lambda model: {}, {})
    model = nn.ModuleDict({"neck": nn.Linear(4, 2)})
    model["online"] = nn.ModuleDict({"neck": nn.Linear(4, 2)})
    assert its.find_heads(model) == [model.get_submodule("online.neck")]


def test_the_pages_conventions_are_followed(page: dict[str, Any]) -> None:
    assert page["attach"](method(page, "Other")).recon_aux.options["weight"] == "auto"
    with pytest.raises(TypeError, match="got MAE, which rebuilds masked patches of one view"):
        page["attach"](method(page, "MAE"))
    headless = method(page)
    headless.neck = headless.projector
    del headless.projector
    with pytest.raises(ValueError, match=r"expected a projection head.* Pass heads=.*neck"):
        page["attach"](headless)
