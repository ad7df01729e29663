"""Momentum encoders and teachers that attach didn't find: the first step sees them."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

import recon_aux
from helpers.own_code import BYOL, WIDTH, Noise, Trained, encoder, frozen, sees_noise, views
from helpers.watching import rebuilt_from

HEADS = ["projector", "target_projector"]


class LoRA(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Conv2d(3, 2, 3, 2), nn.Conv2d(2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Masking(nn.Module):
    """Has a token that its teacher doesn't have."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(3, 1, 1))
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.mask_token)


def wrapped() -> tuple[nn.Module, nn.Module]:
    online = encoder()
    return nn.Sequential(nn.Identity(), online), frozen(online)


def normalised() -> tuple[nn.Module, nn.Module]:
    online = encoder()
    target = frozen(online)
    weight_norm(online[0])
    return online, target


def adapted() -> tuple[nn.Module, nn.Module]:
    online = encoder()
    target = frozen(online)
    online[0] = LoRA(online[0])
    return online, target


def frozen_norm() -> tuple[nn.Module, nn.Module]:
    online = encoder()
    online.insert(1, nn.BatchNorm2d(WIDTH))
    target = frozen(online)
    target[1] = FrozenBatchNorm2d(WIDTH)
    return online, target


def masking() -> tuple[nn.Module, nn.Module]:
    online = Masking(encoder())
    return online, frozen(online.net)


def rebuilt_otherwise() -> tuple[nn.Module, nn.Module]:
    online = encoder()
    names = ("stem", "pool", "flat", "noise")
    return online, frozen(nn.Sequential(OrderedDict(zip(names, online, strict=True))))


@pytest.mark.parametrize(
    "make", [wrapped, normalised, adapted, frozen_norm, masking, rebuilt_otherwise]
)
def test_a_momentum_encoder_that_is_no_copy_is_seen_and_the_advice_helps(
    make: Callable[[], tuple[nn.Module, nn.Module]],
) -> None:
    model: Any = BYOL(*make())
    with torch.no_grad():
        # it has begun to lag behind
        for parameter in model.target.parameters():
            parameter.mul_(0.999)
    noise = next(m for m in model.target.modules() if isinstance(m, Noise))
    recon_aux.attach(model, backbone="online", heads=["projector"])
    with pytest.warns(UserWarning, match=r"saw features of target \(.*momentum_encoders=\[it\]"):
        model.training_step(views(), 0)
    assert sees_noise(model, noise, views())

    recon_aux.detach(model)
    recon_aux.attach(model, backbone="online", heads=HEADS, momentum_encoders="target")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(views(), 0)
    assert not sees_noise(model, noise, views())


def test_what_a_masked_head_takes_from_an_unknown_momentum_encoder_is_no_reason_to_warn() -> None:
    model: Any = BYOL(*wrapped())
    recon_aux.attach(model, backbone="online", heads=HEADS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(views(), 0)
    assert not sees_noise(model, model.target[3], views())


class Taught(Trained):
    """Learns from what ``teach`` gives, which isn't a part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = encoder(), nn.Linear(WIDTH, 8)
        self.teach: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = [self.head(self.encoder(x)) for x in batch]
        loss = (z[0] - z[1]).square().mean() - z[0].std()
        if self.teach is not None:
            with torch.no_grad():
                targets = [self.teach(x) for x in batch]
            loss = loss + (z[0] - targets[1]).square().mean()
        return loss


def other_weights(model: Taught) -> Any:
    teacher, head = encoder(), nn.Linear(WIDTH, 8)
    return lambda x: head(teacher(x))


def by_forward(model: Taught) -> Any:
    teacher, head = encoder(), nn.Linear(WIDTH, 8)
    teacher.load_state_dict(model.encoder.state_dict())
    return lambda x: head(teacher.forward(x))


def compiled(model: Taught) -> Any:
    teacher, head = torch.compile(encoder(), backend="eager"), nn.Linear(WIDTH, 8)
    return lambda x: head(teacher(x))


def by_forward_of_parts(model: Taught) -> Any:
    teacher, head = nn.Sequential(encoder()), nn.Linear(WIDTH, 8)
    teacher[0].load_state_dict(model.encoder.state_dict())
    return lambda x: head(teacher.forward(x))


def of_another_build(model: Taught) -> Any:
    teacher, head = nn.Sequential(nn.Identity(), encoder()), nn.Linear(WIDTH, 8)
    return lambda x: head(teacher(x))


@pytest.mark.parametrize(
    "make", [other_weights, by_forward, by_forward_of_parts, compiled, of_another_build]
)
@pytest.mark.parametrize("before", [True, False])
def test_a_teacher_outside_the_model_is_seen_whenever_it_was_made(before: bool, make: Any) -> None:
    model = Taught()
    model.teach = make(model) if before else None
    recon_aux.attach(model, backbone="encoder", heads=["head"])
    model.teach = model.teach or make(model)
    with pytest.warns(UserWarning, match=r"saw features of a \w+ that isn't in the model"):
        model.training_step(views(), 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel])
def test_a_copy_of_an_attached_model_is_masked_and_no_reason_to_warn(copied: Any) -> None:
    model = recon_aux.attach(Taught(), backbone="encoder", heads=["head"])
    teacher, head = copied(model.encoder), copied(model.head)
    model.teach = lambda x: head(teacher(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(views(), 0)
    assert not sees_noise(model, getattr(teacher, "module", teacher)[3], views())


def trains_on_its_views(model: Any) -> None:
    """Without a warning, a step rebuilds the batch's views."""
    seen, batch = rebuilt_from(model), views()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(batch, 0)
    ((images, _),) = seen
    assert torch.equal(torch.stack(images), batch)


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 1])
def test_other_models_that_see_the_views_are_no_reason_to_warn(width: int) -> None:
    model = recon_aux.attach(Taught(), backbone="encoder", heads=["head"])
    other = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(512, width))
    model.teach = lambda x: other(x)[:, :8]
    trains_on_its_views(model)


def test_modules_may_return_anything_while_they_are_watched() -> None:
    @dataclass(slots=True)
    class Output:
        logits: Tensor

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x.mean((1, 2, 3)))

    model = recon_aux.attach(Taught(), backbone="encoder", heads=["head"])
    other = Other()
    model.teach = lambda x: other(x).logits[:, None]
    trains_on_its_views(model)


def test_no_hook_stays_after_the_first_step_nor_after_the_model() -> None:
    def hooks() -> int:
        return len(hooks_of_all._global_forward_hooks)

    def loop() -> Any:
        net = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(WIDTH, 8)})
        return recon_aux.attach(net, backbone="encoder", heads=["head"])

    # what other tests left
    gc.collect()
    before = hooks()
    model = recon_aux.attach(Taught(), backbone="encoder", heads=["head"])
    model.training_step(views(), 0)
    assert hooks() == before

    net = loop()
    z0, z1 = (net["head"](net["encoder"](x)) for x in views())
    recon_aux.add_loss(net, (z0 - z1).square().mean())
    assert hooks() == before

    net = loop()
    assert hooks() == before
    net["encoder"](views()[0])
    assert hooks() == before + 1
    recon_aux.detach(net)
    assert hooks() == before
    net = loop()
    net["encoder"](views()[0])
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert hooks() == before


def test_between_a_loops_steps_an_average_may_be_evaluated() -> None:
    net: Any = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(WIDTH, 8)})
    average = copy.deepcopy(net["encoder"]).eval()
    recon_aux.attach(net, backbone="encoder", heads=["head"])
    with torch.no_grad():
        average(torch.rand(4, 3, 32, 32))
    seen, batch = rebuilt_from(net), views()
    z0, z1 = (net["head"](net["encoder"](x)) for x in batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recon_aux.add_loss(net, (z0 - z1).square().mean())
    assert torch.equal(torch.stack(seen[0][0]), batch)
