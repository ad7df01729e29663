"""What recon_aux says that it found in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import recon_aux
from helpers.methods import AugmentsInTheStep, Masked, Method, Momentum
from helpers.models import InALoop
from recon_aux.integrations.lightly import attach

HEADS = "heads that see the invariant part alone"


def said(model: Any) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in recon_aux.summary(model).splitlines())


def trained(method: type[Method], **options: Any) -> dict[str, str]:
    model: Any = attach(method(), **options)
    model.training_step(model.batch(), 0)
    return said(model)


@pytest.mark.parametrize(
    ("method", "views"),
    [
        (Method, "4 images of 3x32x32, each view in a call of its own"),
        (AugmentsInTheStep, "4 images of 3x32x32, several views in one call, one by one"),
        (Momentum, "4 images of 3x32x32, the other view from a call without gradient"),
    ],
)
def test_the_views_are_those_of_the_first_step(method: type[Method], views: str) -> None:
    assert said(attach(method()))["views"] == "not known before the first step"
    assert trained(method)["views"] == views


def test_encoders_and_heads_are_named() -> None:
    found = trained(Momentum)
    assert found["encoder"].startswith("backbone (")
    assert found["encoder"].endswith("8 invariant and 8 equivariant channels")
    names = "projection_head (SimCLRProjectionHead), projection_head_momentum"
    assert found[HEADS] == f"{names} (SimCLRProjectionHead)"
    assert found["momentum encoders"].startswith("backbone_momentum (")
    assert trained(Method)["momentum encoders"] == "none"
    assert trained(Method, equivariant_dim=0)[HEADS] == "none"
    assert trained(Masked)["encoder"].startswith("student_backbone (")


def test_the_weight_is_the_one_that_counts() -> None:
    model: Any = attach(Method(), weight="auto")
    assert said(model)["weight"] == "set by the first batch"
    for _ in range(2):
        model.training_step(model.batch(), 0).backward()
    assert said(model)["weight"] == f"{model.recon_aux.weight:g}"
    model.recon_aux.weight = 0.125
    assert said(model)["weight"] == "0.125"


def test_wrappers_and_loops_are_looked_through_and_bare_models_refused() -> None:
    model: Any = attach(InALoop(), weight=1.0)
    compiled = torch.compile(model, backend="eager")
    assert said(compiled) == said(model)
    with pytest.raises(ValueError, match="Pass it to attach first"):
        recon_aux.summary(nn.Linear(1, 1))
