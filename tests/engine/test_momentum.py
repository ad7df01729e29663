"""Momentum encoders that users make by hand: their heads are masked, too, or one is told."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from pytorch_lightning import LightningModule
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from helpers.data import batch
from helpers.inside import hooked
from helpers.models import plain_encoder
from recon_aux.integrations.lightly import attach

VIEWS = batch(side=16)[0]


def head(features: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 8))


class Network(nn.Module):
    """An encoder and what follows, the predictor like the projector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(plain_encoder(), nn.Flatten())
        self.projector = head()
        self.predictor = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projector(self.encoder(x))
        return z


class Taught(LightningModule):
    """A network that is to tell what a teacher makes of the other view."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online: Any = Network()
        self.target = teacher(self.online)
        self.criterion = NegativeCosineSimilarity()

    def taught(self, x: Tensor) -> Tensor:
        z: Tensor = self.target(x)
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch
        with torch.no_grad():
            told = self.taught(x1)
        loss: Tensor = self.criterion(self.online.predictor(self.online(x0)), told)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.online.parameters(), lr=0.1)


class OfModule(Taught):
    """timm's averages are called by their module."""

    def taught(self, x: Tensor) -> Tensor:
        z: Tensor = self.target.module(x)
        return z


class OtherHead(nn.Module):
    """A teacher with the network's encoder and a head that is no copy."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(network.encoder)
        self.follows = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.follows(self.encoder(x))
        return z


def frozen(network: Network) -> nn.Module:
    return copy.deepcopy(network).requires_grad_(False)


def encoder_alone(network: Network) -> nn.Module:
    return nn.Sequential(copy.deepcopy(network.encoder), nn.AdaptiveAvgPool1d(8))


def method_s_losses(model: Any) -> list[float]:
    """The loss as it is, and with other equivariant channels of the teacher's."""
    model.recon_aux.weight = 0.0
    losses = [model.training_step(VIEWS, 0).item()]
    copies: list[Any] = [m for m in model.target.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        copies[1].bias[8:] += 3.0
    return [*losses, model.training_step(VIEWS, 0).item()]


ONLINE = {"backbone": "online.encoder", "heads": ["online.projector"]}


@pytest.mark.parametrize(
    ("method", "teacher"),
    [
        (Taught, frozen),
        (Taught, copy.deepcopy),
        (Taught, AveragedModel),
        (OfModule, ModelEmaV2),
    ],
)
def test_a_teacher_s_head_is_found_by_its_name(method: Any, teacher: Any) -> None:
    model = attach(method(teacher), **ONLINE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="recon_aux")
        first, second = method_s_losses(model)
    assert first == second


@pytest.mark.parametrize("teacher", [OtherHead, encoder_alone])
def test_a_teacher_whose_head_is_not_found_is_told(teacher: Any) -> None:
    model = attach(Taught(teacher), **ONLINE)
    with pytest.warns(UserWarning, match=r"saw target\.\w+ called and none of \['online\.proj"):
        first, second = method_s_losses(model)
    assert first != second


class Symmetric(Taught):
    """Both views go through both networks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, 0) + super().training_step(batch[::-1], 0)


def test_a_teacher_of_both_views_whose_head_is_not_found_is_told_once() -> None:
    model = attach(Symmetric(OtherHead), **ONLINE)
    with pytest.warns(UserWarning, match=r"saw target\.encoder called and none of"):
        model.training_step(VIEWS, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(VIEWS, 1)


def test_a_frozen_head_outside_the_model_is_no_momentum_head() -> None:
    outside = nn.Linear(16, 8).requires_grad_(False)
    model = attach(Taught(frozen), **{**ONLINE, "heads": ["online.projector", outside]})
    assert "target.projector" in hooked(model)
    first, second = method_s_losses(model)
    assert first == second


def test_a_teacher_s_head_that_is_named_is_masked() -> None:
    model = attach(Taught(OtherHead), **{**ONLINE, "heads": ["online.projector", "target.follows"]})
    first, second = method_s_losses(model)
    assert first == second


def test_a_teacher_s_head_that_is_copied_after_attaching_brings_its_mask() -> None:
    model = attach(Taught(OtherHead), **ONLINE)
    model.target = copy.deepcopy(nn.Sequential(model.online.encoder, model.online.projector))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="recon_aux")
        first, second = method_s_losses(model)
    assert first == second


class Side(LightningModule):
    """Without a common parent: a word in the names tells."""

    def __init__(self, average: Any) -> None:
        super().__init__()
        self.backbone, self.projection_head = plain_encoder(), head()
        self.backbone_ema = average(self.backbone)
        self.projection_head_ema = average(self.projection_head)
        self.projector_of_another = head()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "average",
    [AveragedModel, ModelEmaV2, ModelEmaV3, lambda m: AveragedModel(m).requires_grad_(False)],
)
def test_the_modules_of_averages_are_masked(average: Any) -> None:
    heads = ["projection_head", "projection_head_ema.module"]
    model = attach(Side(average), heads=heads[:1])
    assert [name for name in hooked(model) if "head" in name] == heads
    assert heads[1] in hooked(attach(Side(average)))


def test_of_a_teacher_s_heads_that_are_alike_the_name_decides() -> None:
    class Two(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            made: dict[str, nn.Module] = {"encoder": nn.Sequential(plain_encoder(), nn.Flatten())}
            made |= {name: nn.Linear(16, 16) for name in ("first", "second")}
            self.online = nn.ModuleDict(made)
            # in another order
            self.target = nn.ModuleDict(
                {name: copy.deepcopy(made[name]) for name in ("encoder", "second", "first")}
            ).requires_grad_(False)

    model = attach(Two(), backbone="online.encoder", heads=["online.first"])
    heads = {"online.first", "online.second", "target.first", "target.second"}
    assert heads & {*hooked(model)} == {"online.first", "target.first"}
