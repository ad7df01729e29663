"""Each refusal's advice, followed to the letter, leads out.

A case gets itself refused by a few lines, finds the advice in the message, and does what it says.
Every statement of ours that raises or warns has a case, or stands in COVERED_ELSEWHERE.
"""

from __future__ import annotations

import ast
import copy
import importlib
import itertools
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from torchvision import transforms

import recon_aux
from helpers.running import ROOT
from helpers.training import take_steps
from helpers.versions import newer
from helpers.weights import assert_both_trained, weights_of
from recon_aux import ReconAux
from recon_aux.integrations import lightly
from recon_aux.probe import compare, draw_parameters, probe
from recon_aux.probe.inputs import with_eight_bits
from recon_aux.task.options import Options, expand_preset


class Case(NamedTuple):
    """What is refused, a pattern of the advice, and the same thing with the advice followed."""

    refused: Callable[[], Any]
    advice: str
    followed: Callable[[], Any]


CASES: dict[str, Case] = {}

# --- models, as small as can be ---

WIDTH = 8


def encoder(channels: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(channels, WIDTH, 3, 2)
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def views(size: int = 4, channels: int = 3, side: int = 16) -> list[Tensor]:
    images = torch.rand(size, channels, side, side)
    return [images + 0.05 * torch.rand_like(images) for _ in range(2)]


def apart(z0: Tensor, z1: Tensor) -> Tensor:
    return (z0 - z1).square().mean() + 0.1 * (z0 + z1 - 1).square().mean()


def one_by_one(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(model.backbone(x)) for x in batch))


def joined(model: Any, x: Tensor, count: int = 2, take: int = 2) -> Tensor:
    return apart(*model.head(model.backbone(x)).chunk(count)[:take])


class Loop(nn.Module):
    """An encoder and a head, and whatever else is given."""

    recon_aux: Any
    backbone: Any
    head: Any

    def __init__(self, **others: Any) -> None:
        super().__init__()
        for name, value in {"backbone": encoder(), "head": nn.Linear(WIDTH, 4), **others}.items():
            setattr(self, name, value)


class Method(Loop):
    """The same with a training step, and an optimizer."""

    def __init__(self, step: Any = one_by_one, configure: Any = None, **others: Any) -> None:
        super().__init__(**others)
        self.step, self.configure = step, configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return self.configure(self) if self.configure else SGD(self.parameters(), lr=0.1)


SMALL: dict[str, Any] = {"target_size": 16, "decoder_dim": 16, "decoder_heads": 2}


def deeper() -> Method:
    return Method(backbone=nn.Sequential(*encoder(), nn.Linear(WIDTH, WIDTH)))


def attached(model: Any = None, **options: Any) -> Any:
    given = {"backbone": "backbone", "heads": ["head"], **SMALL, **options}
    return recon_aux.attach(Method() if model is None else model, **given)


def trains(
    model: Any, batch: Any = None, step: Any = None, optimizer: Any = None, count: int = 2
) -> None:
    """Some steps change encoder and decoder, and their losses are finite."""
    batch = views() if batch is None else batch
    if optimizer is None:
        configured = getattr(model, "configure_optimizers", lambda: SGD(model.parameters(), 0.1))()
        optimizer = configured[0][0] if isinstance(configured, tuple) else configured
    before = weights_of(model)
    take_steps(model, optimizer, [batch] * count, step)
    assert_both_trained(model, before, "head")


def of_torch(version: str, **options: Any) -> None:
    """Build the task as if torch were of that version."""
    with patch.object(torch, "__version__", version):
        ReconAux(WIDTH, **options)


def fit(model: Any = None, batch: Any = None, **options: Any) -> Any:
    model = attached(model, **options)
    trains(model, batch)
    return model


def with_loss(model: Any, batch: Any) -> Tensor:
    return recon_aux.add_loss(model, one_by_one(model, batch))


def loop(model: Any = None, step: Any = with_loss, batch: Any = None, **options: Any) -> None:
    trains(attached(model or Loop(), **options), batch, step)


def task(
    views: Any = (4, 3, 16, 16), features: Any = (4, WIDTH), change: Any = None, **options: Any
) -> None:
    """One call of ReconAux, whose loss is finite."""
    aux = ReconAux(**{"feature_dim": WIDTH, **SMALL, **options})
    given = [torch.rand(2, *views), torch.rand(2, *features)]
    output = aux(*(given if change is None else change(*given)))
    assert torch.isfinite(output.loss)


# --- the task ---

CASES |= {
    "a weight that isn't negative": Case(
        lambda: fit(weight=-1.0),
        "weight= as a finite number of 0 or more, .*Pass such a number",
        lambda: fit(weight=1.0),
    ),
    "a finite weight": Case(
        lambda: setattr(ReconAux(WIDTH), "weight", None),
        "pass a float",
        lambda: setattr(ReconAux(WIDTH), "weight", 2.0),
    ),
    "a whole number": Case(
        lambda: fit(equivariant_dim=0.5),
        "equivariant_dim= as a whole number.* Pass such a number",
        lambda: fit(equivariant_dim=4),
    ),
    "a number that isn't too small": Case(
        lambda: fit(decoder_depth=0), "Pass 1, or more", lambda: fit(decoder_depth=1)
    ),
    "a choice": Case(
        lambda: fit(loss="huber"), r"one of \('mse', .*Pass one of them", lambda: fit(loss="mse")
    ),
    "a size that divides": Case(
        lambda: fit(patch_size=5),
        "patch_size that divides target_size=16.*Pass one that does",
        lambda: fit(patch_size=4),
    ),
    "an option that is misspelt": Case(
        lambda: fit(wieght=2.0), r"did you mean weight=\?", lambda: fit(weight=2.0)
    ),
    "an option like none": Case(lambda: fit(zzz=2.0), r"zzz=; leave it out\.", fit),
    "compile= before torch 2.7": Case(
        lambda: of_torch("2.6.0", compile=True),
        r"expected torch 2\.7 or later for compile=True, got 2\.6\.0\. Leave compile out",
        lambda: of_torch("2.6.0"),
    ),
    "patches of one number": Case(
        lambda: fit(Method(backbone=encoder(1)), views(channels=1), patch_size=1, image_channels=1),
        "Pass a larger patch_size=",
        lambda: fit(Method(backbone=encoder(1)), views(channels=1), patch_size=2, image_channels=1),
    ),
    "a context without channels": Case(
        lambda: fit(equivariant_dim=WIDTH),
        "Pass a smaller equivariant_dim=",
        lambda: fit(equivariant_dim=WIDTH - 1),
    ),
    "an invariant part without channels": Case(
        lambda: fit(equivariant_dim=WIDTH, context="equivariant"),
        "Pass a smaller equivariant_dim=",
        lambda: fit(equivariant_dim=WIDTH - 1, context="equivariant"),
    ),
    "one equivariant channel": Case(
        lambda: fit(equivariant_dim=1),
        "Pass equivariant_dim=0, or 2 or more",
        lambda: [fit(equivariant_dim=0), fit(equivariant_dim=2)],
    ),
    "more equivariant channels than there are": Case(
        lambda: fit(equivariant_dim=9),
        "from 0 to the feature's 8 channels, got 9. Pass one of these",
        lambda: [fit(equivariant_dim=0), fit(equivariant_dim=7)],
    ),
    "channels of another number": Case(
        lambda: task(features=(4, 9)),
        "feature_dim= must be their number of channels. Pass it so",
        lambda: task(features=(4, 9), feature_dim=9),
    ),
    "positions for a decoder without": Case(
        lambda: task(features=(4, WIDTH, 2, 2)),
        "spatial=True builds a decoder for those. Pass it",
        lambda: task(features=(4, WIDTH, 2, 2), spatial=True),
    ),
    "a map that is larger than the blank image's": Case(
        lambda: fit(pooled_by_stride(), views(side=128), equivariant_dim=0),
        "To attach pass example_input=: images of the size that is trained on",
        lambda: fit(
            pooled_by_stride(),
            views(side=128),
            equivariant_dim=0,
            example_input=torch.rand(1, 3, 128, 128),
        ),
    ),
    "a decoder without context": Case(
        lambda: recon_aux.CrossAttentionDecoder(8, 8)(torch.rand(2, 8)),
        "Pass context=, or build with context_dim=0",
        lambda: [
            recon_aux.CrossAttentionDecoder(8, 8)(torch.rand(2, 8), torch.rand(2, 8)),
            recon_aux.CrossAttentionDecoder(8, 0)(torch.rand(2, 8)),
        ],
    ),
    "one view": Case(lambda: task(change=lambda x, y: (x[:1], y)), "Pass two of each", task),
    "views of other channels": Case(
        lambda: task((4, 1, 16, 16)),
        "Pass image_channels= if all views have another number",
        lambda: task((4, 1, 16, 16), image_channels=1),
    ),
    "views of two kinds": Case(
        lambda: fit(two_stems(), views(channels=2) + views()),
        "encode two of one kind",
        lambda: fit(two_stems()),
    ),
    "features without positions": Case(
        lambda: task(features=(4, 0, WIDTH), spatial=True),
        "Pass larger views to the encoder",
        lambda: task(features=(4, 1, WIDTH), spatial=True),
    ),
    "features of two shapes": Case(
        lambda: task(
            features=(4, 2, WIDTH),
            change=lambda x, y: (x, (y[0], y[1][:, :1])),
            spatial=True,
            reconstruct="both",
        ),
        "Pass those of two views of one size",
        lambda: task(features=(4, 2, WIDTH), spatial=True, reconstruct="both"),
    ),
    "complex views": Case(
        lambda: task(change=lambda x, y: (x + 0j, y)),
        r"Pass view\.real",
        lambda: task(change=lambda x, y: ((x + 0j).real, y)),
    ),
    "whole features": Case(
        lambda: task(change=lambda x, y: (x, y.long())),
        r"Pass view\.real or feature\.float\(\)",
        lambda: task(change=lambda x, y: (x, y.long().float())),
    ),
    "two devices": Case(
        lambda: task(change=lambda x, y: (x.to("meta"), y)), r"Move them by \.to\(device\)", task
    ),
    "batches of two sizes": Case(
        lambda: task(change=lambda x, y: (x, y[:, :2])), "Pass as many of each, one or more", task
    ),
    "a reconstruction of another shape": Case(
        lambda: recon_aux.ReconstructionLoss()(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4)),
        "Pass two of one shape",
        lambda: recon_aux.ReconstructionLoss(patch_size=4)(*torch.rand(2, 1, 3, 4, 4)),
    ),
    "other features to rebuild from": Case(
        lambda: ReconAux(WIDTH).rebuild(torch.rand(4, WIDTH), torch.rand(3, WIDTH)),
        "expected as many other features as features.* Pass as many of each",
        lambda: ReconAux(WIDTH).rebuild(*torch.rand(2, 4, WIDTH)),
    ),
    "a preset of options alone": Case(
        lambda: Options(feature_dim=WIDTH, preset="paper"),
        r"Pass \*\*expand_preset\(\{'preset': 'paper'\}\)",
        lambda: Options(feature_dim=WIDTH, **expand_preset({"preset": "paper"})),
    ),
    "a weight that was 0": Case(
        lambda: fit_by_weights(built=0.0, then=1.0),
        r"build with a positive weight=, then set \.weight = 0",
        lambda: fit_by_weights(built=1.0, then=0.0),
    ),
    "NaN in the data": Case(
        lambda: fit(batch=[x * float("nan") for x in views()]),
        "Look for NaN or infinity in the data",
        fit,
    ),
    "a loss that runs away": Case(
        lambda: trains(attached(weight=1.0, decoder_lr=DIVERGES), count=4),
        "Lower the learning rate, or the decoder's alone, by attach's decoder_lr=",
        lambda: trains(attached(weight=1.0, decoder_lr=0.1), count=4),
    ),
}

# of the decoder: large enough to diverge, small enough to stay finite for some steps
DIVERGES = 100.0


def pooled_by_stride() -> Method:
    """Its map has one position for 64 pixels."""
    convolution = nn.Conv2d(3, WIDTH, 64, 64)
    return Method(lambda m, batch: apart(*(m.backbone(x).mean((2, 3)) for x in batch)),
                  backbone=convolution, head=nn.Identity())  # fmt: skip


class TwoStems(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(n, 8, 3, 2) for n in (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stems[x.shape[1] == 2](x)
        return y.mean((2, 3))


def two_stems() -> Method:
    def step(model: Any, batch: Any) -> Tensor:
        return one_by_one(model, batch[:2]) + one_by_one(model, batch[-2:])

    return Method(step, backbone=TwoStems())


def fit_by_weights(built: float, then: float) -> None:
    model = attached(weight=built)
    model.recon_aux.weight = then
    model.training_step(views(), 0)
    model.recon_aux.weight = 1.0
    trains(model)


# --- what was saved ---


def saved(**options: Any) -> dict[str, Any]:
    state: dict[str, Any] = attached(**options).state_dict()
    return state


def resumed(state: dict[str, Any], **options: Any) -> None:
    model = attached(**options)
    model.load_state_dict(state)
    trains(model)


def resumed_optimizer(saved_with: dict[str, Any], **options: Any) -> None:
    old, model = attached(**saved_with), attached(**options)
    model.load_state_dict(old.state_dict())
    optimizer = model.configure_optimizers()
    optimizer.load_state_dict(old.configure_optimizers().state_dict())
    trains(model, optimizer=optimizer)


def weights_alone() -> None:
    resumed(saved(decoder_lr=0.2))


CASES |= {
    "another decoder": Case(
        lambda: resumed(saved(decoder_depth=2)),
        "expected the options it was saved with: decoder_depth=2",
        lambda: resumed(saved(decoder_depth=2), decoder_depth=2),
    ),
    "other options": Case(
        lambda: resumed(saved(weight=2.0), weight=1.0),
        r"saved with other options: weight=2\.0, not 1\.0",
        lambda: resumed(saved(weight=2.0), weight=2.0),
    ),
    "groups of another number": Case(
        lambda: resumed_optimizer({"decoder_lr": 0.2}),
        "give the decoder_lr= and decoder_weight_decay= that it was saved with",
        lambda: resumed_optimizer({"decoder_lr": 0.2}, decoder_lr=0.2),
    ),
    "groups of another number, once more": Case(
        lambda: resumed_optimizer({"decoder_lr": 0.2}),
        "or load the model's state_dict alone",
        weights_alone,
    ),
    "a path in place of a state_dict": Case(
        lambda: recon_aux.strip("model.ckpt"),  # type: ignore[arg-type]
        r"expected a state_dict, as torch\.load\(path\) gives it.* Pass that",
        lambda: Method().load_state_dict(recon_aux.strip(saved())),
    ),
    "a function in place of a model": Case(
        lambda: recon_aux.export_backbone(attached(), like=encoder),  # type: ignore[arg-type]
        "Build the model first",
        lambda: encoder().load_state_dict(recon_aux.export_backbone(attached(), like=encoder())),
    ),
    "an architecture with less": Case(
        lambda: recon_aux.export_backbone(attached(deeper()), like=encoder()),
        r"saw 2 tensors that it hasn't, as 3.bias.*Pass like= of the architecture that was trained",
        lambda: recon_aux.export_backbone(attached(deeper()), like=deeper().backbone),
    ),
    "another architecture": Case(
        lambda: recon_aux.export_backbone(attached(), like=nn.Linear(2, 2)),
        "Pass like= a model that has the encoder's layers",
        lambda: encoder().load_state_dict(recon_aux.export_backbone(attached(), like=encoder())),
    ),
}

# --- attach: the model ---


def own_step_with_the_task() -> None:
    """What the README shows for manual optimization."""
    model = Method(recon_aux=ReconAux(WIDTH, **SMALL))

    def step(model: Any, batch: Any) -> Tensor:
        features = [model.backbone(x) for x in batch]
        z = (F.linear(model.recon_aux.invariant(y), model.head.weight[:, :4]) for y in features)
        return apart(*z) + model.recon_aux(batch, features).loss

    trains(model, step=step)


def compiled_first() -> None:
    attached(torch.compile(Method(), backend="eager"))


def compiled_after() -> None:
    model = attached()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    trains(model, step=lambda _, batch: compiled.training_step(batch, 0))


def switched_by_hand(model: Any) -> Any:
    model.automatic_optimization = False
    return model


class ByHand(Method):
    """Its own loop gets the loss from forward."""

    automatic_optimization = False

    def forward(self, batch: Any) -> Any:
        return {"loss": one_by_one(self, batch)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch)["loss"]


def its_forward(model: Any) -> Any:
    model.forward = lambda batch: {"loss": one_by_one(model, batch)}
    return model


CASES |= {
    "a class": Case(lambda: attached(Method), "Build the model first", fit),
    "a compiled model": Case(
        compiled_first, "attach first, then compile or wrap it", compiled_after
    ),
    "a wrapped model": Case(
        lambda: lightly.attach(nn.DataParallel(Method())),
        "attach first, then compile or wrap it",
        lambda: nn.DataParallel(attached()),
    ),
    "no channels": Case(
        lambda: attached(image_channels=0),
        "image_channels= of 1 or more, got 0. Pass 1",
        lambda: fit(Method(backbone=encoder(1)), views(channels=1), image_channels=1),
    ),
    "an attached model": Case(
        lambda: attached(attached()),
        r"Call recon_aux\.detach\(model\) first",
        lambda: fit(recon_aux.detach(attached())),
    ),
    "a bare model": Case(
        lambda: recon_aux.export_backbone(Method()),
        "Pass it to attach first",
        lambda: recon_aux.export_backbone(attached()),
    ),
    "a module of the task's name": Case(
        lambda: fit(Method(recon_aux=nn.Linear(1, 1))),
        "Give yours another name",
        lambda: fit(Method(another=nn.Linear(1, 1))),
    ),
    "optimization by hand": Case(
        lambda: fit(switched_by_hand(Method())),
        r"Or call recon_aux\.ReconAux in the step",
        own_step_with_the_task,
    ),
    "optimization by hand, with a method that returns the loss": Case(
        lambda: fit(ByHand()),
        "a method of its own, and pass step_method= its name",
        lambda: fit(ByHand(), step_method="forward"),
    ),
    "a step that isn't there": Case(
        lambda: fit(ByHand(), step_method="compute_loss"),
        "Pass the name of the method that returns the loss",
        lambda: fit(ByHand(), step_method="forward"),
    ),
    "a method that was replaced since": Case(
        lambda: trains(its_forward(attached(ByHand(), step_method="forward")), count=3),
        "Replace training_step before attaching, and what step_method= names",
        lambda: fit(its_forward(ByHand()), step_method="forward"),
    ),
    "views that are no number": Case(
        lambda: fit(views=0),
        "views= of 1 or more, got 0. Pass 1",
        lambda: fit(views=2),
    ),
    "a learning rate of the decoder's in a loop": Case(
        lambda: attached(Loop(), decoder_lr=0.1),
        r"give model\.recon_aux\.parameters\(\) a group",
        lambda: trains_with_own_group(attached(Loop())),
    ),
    "a method without two views, by its name": Case(
        lambda: lightly.attach(type("MAE", (Method,), {})()),
        "pass backbone= and heads=",
        lambda: trains(
            lightly.attach(type("MAE", (Method,), {})(), backbone="backbone", heads=["head"])
        ),
    ),
    "an encoder without a usual name": Case(
        lambda: lightly.attach(Method(step=trunks, backbone=None, trunk=encoder(), **projection())),
        r"Pass backbone=: one of .*trunk",
        lambda: trains(
            lightly.attach(
                Method(step=trunks, backbone=None, trunk=encoder(), **projection()),
                backbone="trunk",
            )
        ),
    ),
    "a head without a usual name": Case(
        lambda: lightly.attach(Method()),
        r"Pass heads=\[\.\.\.\]: .*head",
        lambda: trains(lightly.attach(Method(), heads=["head"])),
    ),
    "no head": Case(
        lambda: lightly.attach(Method(head=nn.Identity())),
        "If it has none, pass equivariant_dim=0",
        lambda: trains(lightly.attach(Method(head=nn.Identity()), equivariant_dim=0)),
    ),
    "positions that are matched by whole features": Case(
        lambda: lightly.attach(dense()),
        "or pass equivariant_dim=0",
        lambda: trains(lightly.attach(dense(), equivariant_dim=0)),
    ),
    "an encoder that isn't there": Case(
        lambda: fit(backbone="trunk"),
        "there are: backbone .*Pass one of these",
        lambda: fit(backbone="backbone"),
    ),
    "a head that isn't there": Case(
        lambda: fit(heads=["top"]),
        "there are: .*head .*Pass one of these",
        lambda: fit(heads=["head"]),
    ),
    "an encoder of another model": Case(
        lambda: fit(backbone=encoder()),
        "got 'Sequential'; there are: backbone .*Pass one of these",
        lambda: fit(backbone="backbone"),
    ),
    "a head within what isn't the encoder alone": Case(
        lambda: fit(Method(step=students, student=student()), **of_student("student")),
        r'backbone= has to be the encoder alone, as "student\.backbone"',
        lambda: fit(Method(step=students, student=student()), **of_student("student.backbone")),
    ),
    "a head that is the encoder's last layer": Case(
        lambda: fit(
            Method(lambda m, batch: apart(*map(m.backbone, batch)), backbone=Classifier()),
            heads=["backbone.fc"],
        ),
        r"has to stand beside it: put nn\.Identity\(\) in its place",
        lambda: fit(Method(backbone=Classifier(nn.Identity()))),
    ),
}


def trains_with_own_group(model: Any) -> None:
    groups = [
        {"params": [*model.backbone.parameters(), *model.head.parameters()]},
        {"params": model.recon_aux.parameters(), "lr": 0.05},
    ]
    trains(model, step=with_loss, optimizer=SGD(groups, lr=0.1))


def projection() -> dict[str, Any]:
    return {"head": None, "projection_head": nn.Linear(WIDTH, 4)}


def dense() -> Method:
    head = newer("lightly.models.modules", "DenseCLProjectionHead")(WIDTH, WIDTH, 4)
    step = lambda model, batch: apart(*(head(model.backbone(x)) for x in batch))  # noqa: E731
    return Method(step=step, head=None, projection_head=head)


def trunks(model: Any, batch: Any) -> Tensor:
    return apart(*(model.projection_head(model.trunk(x)) for x in batch))


def student() -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": encoder(), "head": nn.Linear(WIDTH, 4)})


def students(model: Any, batch: Any) -> Tensor:
    return one_by_one(SimpleNamespace(**model.student), batch)


def of_student(backbone: str) -> dict[str, Any]:
    return {"backbone": backbone, "heads": ["student.head"]}


class Classifier(nn.Module):
    def __init__(self, fc: nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.fc = encoder(), fc or nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.layers(x))
        return y


# --- attach: what the encoder takes and returns ---


class Encoder(nn.Module):
    """Calls an encoder as ``call`` does."""

    def __init__(self, call: Callable[..., Any], layers: nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.call = layers or encoder(), call
        self.kept: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)

    def encode(self, x: Tensor) -> Any:
        return self.layers(x)


def in_a_dict(self: Any, x: Tensor) -> Any:
    return {"a": self.layers(x), "b": x.mean((2, 3)) @ torch.rand(3, WIDTH)}


def of_bands(self: Any, x: Tensor, wavelengths: Tensor) -> Tensor:
    return self.layers(x * wavelengths[:, None, None])


def takes_bands(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(model.backbone(x, torch.ones(3))) for x in batch))


def flat(side: int, channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, WIDTH))


def taking(name: Any) -> Any:
    """A step that takes one entry of what the encoder returns."""
    return lambda m, batch: apart(*(m.head(m.backbone(x)[name]) for x in batch))


def by_lines() -> Encoder:
    """Begins with a convolution along lines of pixels."""
    layers = nn.Sequential(nn.Conv1d(3, WIDTH, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return Encoder(lambda self, x: self.layers(x.flatten(2)), layers)


def cube() -> Method:
    """Gives a map with its channels last, of as many positions."""
    layers = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.AdaptiveAvgPool2d(WIDTH))
    backbone = Encoder(lambda self, x: self.layers(x).movedim(1, -1), layers)
    return Method(
        lambda m, batch: apart(*(m.head(m.backbone(x).mean((1, 2))) for x in batch)),
        backbone=backbone,
    )


def wrapping() -> Method:
    """An encoder of images, within which another takes them flattened."""
    return Method(backbone=Encoder(lambda self, x: self.layers(x.flatten(1)), flat(16)))


def with_states(self: Any, x: Tensor, states: bool = False) -> Any:
    return {"a": self.layers(x), "states": [self.layers(x)] if states else None}


def asks_for_states(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(model.backbone(x, states=True)["states"][0]) for x in batch))


def last_state(output: Any) -> Tensor:
    return output["states"][-1]


def of_two_kinds() -> dict[str, Any]:
    """Radar of two channels beside optical images of four."""

    def step(model: Any, batch: Any) -> Tensor:
        radar = torch.rand(4, 2, 16, 16)
        return apart(*(model.head(model.backbone(radar, x)) for x in batch))

    return {
        "model": Method(
            step, backbone=Encoder(lambda self, r, x: self.layers(x[:, 1:] + r.mean()))
        ),
        "batch": views(channels=4),
        "example_input": (torch.rand(1, 2, 16, 16), torch.rand(1, 4, 16, 16)),
    }


CASES |= {
    "a method that isn't there": Case(
        lambda: fit(backbone_method="embed"),
        "Pass the name of the method that the training step calls",
        lambda: fit(backbone_method="forward"),
    ),
    "an encoder of one size": Case(
        lambda: fit(Method(backbone=flat(16))),
        "Pass image_size= and image_channels=",
        lambda: fit(Method(backbone=flat(16)), image_size=16),
    ),
    "an encoder of other channels": Case(
        lambda: fit(Method(backbone=flat(16, 1)), views(channels=1), image_size=16),
        "Pass image_size= and image_channels=",
        lambda: fit(
            Method(backbone=flat(16, 1)), views(channels=1), image_size=16, image_channels=1
        ),
    ),
    "an encoder of more than images": Case(
        lambda: fit(Method(takes_bands, backbone=Encoder(of_bands))),
        "If it is called with more than images, pass example_input=: a tuple",
        lambda: fit(
            Method(takes_bands, backbone=Encoder(of_bands)),
            example_input=(torch.rand(1, 3, 16, 16), torch.ones(3)),
        ),
    ),
    "more than images, by name": Case(
        lambda: fit(Method(takes_bands, backbone=Encoder(of_bands))),
        "pass example_input=: .*, or a dict of keyword arguments",
        lambda: fit(
            Method(
                lambda m, batch: apart(
                    *(m.head(m.backbone(x=x, wavelengths=torch.ones(3))) for x in batch)
                ),
                backbone=Encoder(of_bands),
            ),
            example_input={"x": torch.rand(1, 3, 16, 16), "wavelengths": torch.ones(3)},
        ),
    ),
    "images with their channels last": Case(
        lambda: fit(
            Method(backbone=Encoder(lambda self, x: self.layers(x.movedim(-1, 1)))),
            [x.movedim(1, -1) for x in views()],
            example_input=torch.rand(1, 16, 16, 3),
        ),
        r"Move them in the training step, images\.movedim\(-1, 1\)",
        lambda: fit(
            Method(
                lambda m, batch: one_by_one(m, [x.movedim(-1, 1) for x in batch]),
                backbone=Encoder(lambda self, x: self.layers(x)),
            ),
            [x.movedim(1, -1) for x in views()],
        ),
    ),
    "images of two kinds": Case(
        lambda: fit(**of_two_kinds()),
        r"Pass image_channels= of those that are to be rebuilt",
        lambda: fit(**of_two_kinds(), image_channels=4),
    ),
    "an encoder of signals": Case(
        lambda: fit(Method(signals=nn.Sequential(nn.Conv1d(3, WIDTH, 3))), backbone="signals"),
        r"Pass backbone=: the module that takes images \(B, C, H, W\)",
        lambda: fit(Method(signals=nn.Sequential(nn.Conv1d(3, WIDTH, 3)))),
    ),
    "images that are taken as signals": Case(
        lambda: fit(Method(backbone=by_lines())),
        "If it does take images, pass example_input=: what the training step calls it with",
        lambda: fit(Method(backbone=by_lines()), example_input=torch.rand(1, 3, 16, 16)),
    ),
    "an encoder that is called with no images": Case(
        lambda: fit(wrapping(), backbone="backbone.layers", image_size=16),
        r"Pass backbone=: the module that takes images \(B, C, H, W\)",
        lambda: fit(wrapping(), backbone="backbone", image_size=16),
    ),
    "a dict in place of a feature": Case(
        lambda: fit(Method(taking("a"), backbone=Encoder(in_a_dict))),
        r"Pass features=lambda output: \.\.\.",
        lambda: fit(Method(taking("a"), backbone=Encoder(in_a_dict)), features=lambda o: o["a"]),
    ),
    "a feature of five dimensions": Case(
        lambda: fit(Method(taking(...), backbone=five_dimensions())),
        r"Pass features=lambda output: \.\.\., which takes such a feature",
        lambda: fit(
            Method(
                lambda m, batch: apart(*(m.head(m.backbone(x).flatten(1)) for x in batch)),
                backbone=five_dimensions(),
            ),
            features=lambda output: output.flatten(1),
        ),
    ),
    "another key than there is": Case(
        lambda: fit(
            Method(taking("a"), backbone=Encoder(in_a_dict)), features=lambda o: o["pooled"]
        ),
        "Pass a function that takes it from there",
        lambda: fit(Method(taking("a"), backbone=Encoder(in_a_dict)), features=lambda o: o["a"]),
    ),
    "states that the blank image doesn't ask for": Case(
        lambda: fit(Method(asks_for_states, backbone=Encoder(with_states)), features=last_state),
        "If the training step calls the encoder with more than images, pass example_input=",
        lambda: fit(
            Method(asks_for_states, backbone=Encoder(with_states)),
            features=last_state,
            example_input={"x": torch.rand(1, 3, 16, 16), "states": True},
        ),
    ),
    "channels that may be first or last": Case(
        lambda: fit(cube()),
        r"last, pass features=lambda output: output\.movedim\(-1, 1\)",
        lambda: fit(cube(), features=lambda output: output.movedim(-1, 1)),
    ),
}


def five_dimensions() -> Encoder:
    return Encoder(lambda self, x: self.layers(x)[..., None, None, None])


# --- configure_optimizers ---


class UnknownScheduler:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class Bare:
    """Has parameter groups, but isn't one of torch's optimizers."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups: list[Any] = [{"params": [*parameters], "lr": 0.1}]

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad


class Sharding(SGD):
    """Steps what it was made of, whatever is added to its groups."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.known = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.known:
                p.sub_(0.1 * p.grad)


def without_decoder(model: Any) -> list[Any]:
    return [*model.backbone.parameters(), *model.head.parameters()]


def own_group(model: Any, scheduled: bool = False) -> Any:
    its: dict[str, Any] = {"params": [*model.recon_aux.parameters()], "lr": 0.01}
    optimizer = SGD([{"params": without_decoder(model)}, its], lr=0.1)
    return ([optimizer], [UnknownScheduler(optimizer)]) if scheduled else optimizer


def scheduled(model: Any) -> Any:
    optimizer = SGD(model.backbone.parameters(), lr=0.1)
    return [optimizer], [UnknownScheduler(optimizer)]


def made_before(kind: Any, add: bool = False, again: bool = False, **options: Any) -> None:
    """A loop whose optimizer was made before attaching, or after."""
    model = Loop()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    attached(model)
    if add:
        optimizer.add_param_group({"params": model.recon_aux.parameters()})
    if again:
        optimizer = kind(model.parameters(), lr=0.1, **options)
    trains(model, step=with_loss, optimizer=optimizer, count=4)


CASES |= {
    "no optimizer": Case(lambda: fit(Method(configure=lambda m: [])), "Return an optimizer", fit),
    "the decoder's learning rate in no optimizer of torch's": Case(
        lambda: fit(Method(configure=lambda m: Bare(m.parameters())), decoder_lr=0.1),
        r"Leave decoder_lr= out, or give self\.recon_aux\.parameters\(\) a group",
        lambda: fit(Method(configure=lambda m: Bare(m.parameters()))),
    ),
    "the decoder's learning rate twice": Case(
        lambda: fit(Method(configure=own_group), decoder_lr=0.1),
        "Leave one of them out",
        lambda: [fit(Method(configure=own_group)), fit(decoder_lr=0.1)],
    ),
    "a scheduler of an unknown kind": Case(
        lambda: fit(Method(configure=scheduled), decoder_lr=0.01),
        r"let configure_optimizers make a group of self\.recon_aux\.parameters\(\)",
        lambda: fit(Method(configure=partial(own_group, scheduled=True))),
    ),
    "an encoder's learning rate of 0": Case(
        lambda: fit(Method(configure=lambda m: SGD(m.parameters(), 0.0)), decoder_lr=0.1),
        "or give the encoder a learning rate",
        lambda: fit(Method(configure=lambda m: SGD(m.parameters(), 0.1)), decoder_lr=0.1),
    ),
    "an optimizer that was made before": Case(
        lambda: made_before(SGD),
        r"Make the optimizer after attaching",
        lambda: made_before(SGD, again=True),
    ),
    "an optimizer that was made before, once more": Case(
        lambda: made_before(SGD),
        r"or call optimizer\.add_param_group\(\{'params': model\.recon_aux\.parameters\(\)\}\)",
        lambda: made_before(SGD, add=True),
    ),
    "a fused optimizer that was made before": Case(
        lambda: made_before(AdamW, fused=True),
        r"Make the optimizer after attaching",
        lambda: made_before(AdamW, fused=True, again=True),
    ),
    "an optimizer that goes by what it was made with": Case(
        lambda: trains(attached(Method(configure=lambda m: Sharding(without_decoder(m)))), count=4),
        r"list model\.recon_aux\.parameters\(\) with them",
        lambda: trains(attached(Method(configure=lambda m: Sharding(m.parameters()))), count=4),
    ),
}

# --- the step: the encoder that is trained ---


def two_encoders(model: Any, batch: Any) -> Tensor:
    """The first view through the one, the second through the other."""
    key = model.head(model.other(batch[1]))
    return apart(model.head(model.backbone(batch[0])), key.detach() if model.detached else key)


def methods_encode(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(model.backbone.encode(x)) for x in batch))


def kept(self: Any, x: Tensor) -> Tensor:
    self.kept = self.layers(x)
    return x.mean((2, 3)) @ self.other


def keeping() -> Method:
    """The head takes what a hook kept, not what the encoder returns."""
    backbone = Encoder(kept)
    backbone.other = nn.Parameter(torch.rand(3, WIDTH))

    def step(model: Any, batch: Any) -> Tensor:
        z = []
        for x in batch:
            model.backbone(x)
            z.append(model.head(model.backbone.kept))
        return apart(*z)

    return Method(step, backbone=backbone)


def takes_what_is_kept() -> None:
    model = keeping()
    fit(model, features=lambda output: model.backbone.kept)


def warm_up(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(model.backbone(x).detach()) for x in batch))


def warms_up_by_freezing() -> None:
    model = attached()
    model.backbone.requires_grad_(False)
    with warnings.catch_warnings():
        # says that nothing is rebuilt meanwhile
        warnings.filterwarnings("ignore", "recon_aux: .* is frozen")
        model.training_step(views(), 0).backward()
    model.backbone.requires_grad_(True)
    trains(model)


def looks_on(model: Any, batch: Any) -> Tensor:
    """Another encoder is trained than the one that is called, too."""
    for x in batch:
        model.backbone(x)
    return apart(*(model.head(model.trunk(x)) for x in batch))


def wide() -> nn.Sequential:
    return encoder().append(nn.Linear(WIDTH, WIDTH))


CASES |= {
    "an encoder that isn't called": Case(
        lambda: fit(Method(lambda m, b: apart(*(m.head(m.trunk(x)) for x in b)), trunk=wide())),
        r"Pass backbone=: one of .*trunk",
        lambda: fit(
            Method(lambda m, b: apart(*(m.head(m.trunk(x)) for x in b)), trunk=wide()),
            backbone="trunk",
        ),
    ),
    "another method of the encoder": Case(
        lambda: fit(Method(methods_encode, backbone=Encoder(lambda self, x: self.layers(x)))),
        "Pass backbone_method= if another of its methods is called",
        lambda: fit(
            Method(methods_encode, backbone=Encoder(lambda self, x: self.layers(x))),
            backbone_method="encode",
        ),
    ),
    "a loss that is added before the encoder is called": Case(
        lambda: loop(step=lambda m, b: recon_aux.add_loss(m, m.head.weight.sum())),
        "Encode both views with gradient, then call add_loss, in each step",
        loop,
    ),
    "two chunks, each with its own add_loss": Case(
        lambda: loop(step=two_chunks), "then call add_loss, in each step", loop
    ),
    "two encoders that are trained": Case(
        lambda: fit(Method(two_encoders, other=encoder(), detached=False)),
        "What a momentum encoder gives has to be detached",
        lambda: fit(Method(two_encoders, other=encoder(), detached=True)),
    ),
    "another tensor than the loss depends on": Case(
        lambda: fit(Method(taking("a"), backbone=two_outputs()), features=lambda o: o["b"]),
        "Let features= take what the heads receive",
        lambda: fit(Method(taking("a"), backbone=two_outputs()), features=lambda o: o["a"]),
    ),
    "a feature that a hook took": Case(
        lambda: fit(keeping()),
        "pass features=lambda output: that tensor",
        takes_what_is_kept,
    ),
    "a warm-up by detached features": Case(
        lambda: fit(Method(warm_up)),
        r"A warm-up of the heads needs encoder\.requires_grad_\(False\)",
        warms_up_by_freezing,
    ),
    "an encoder on which no loss depends": Case(
        lambda: fit(Method(looks_on, trunk=wide())),
        "Pass backbone=: one of .*trunk",
        lambda: fit(Method(looks_on, trunk=wide()), backbone="trunk"),
    ),
    "an encoder that is frozen": Case(
        lambda: fit(frozen_beside_a_trained_one()),
        "If another module is trained, pass backbone= to attach",
        lambda: fit(frozen_beside_a_trained_one(), backbone="trunk"),
    ),
}


def two_chunks(model: Any, batch: Any) -> Tensor:
    z = [model.head(model.backbone(x)) for x in batch]
    return recon_aux.add_loss(model, apart(*z)) + recon_aux.add_loss(model, apart(*z))


def two_outputs() -> Encoder:
    backbone = Encoder(lambda self, x: {"a": self.layers(x), "b": self.b(x)})
    backbone.b = encoder()
    return backbone


def frozen_beside_a_trained_one() -> Method:
    def step(model: Any, batch: Any) -> Tensor:
        return apart(*(model.head(model.trunk(x) + model.backbone(x)) for x in batch))

    return Method(step, backbone=encoder().requires_grad_(False), trunk=wide())


# --- the step: the heads ---


def with_a_table(head: str) -> Method:
    """Trains a table's encoder, too, by one of the heads."""

    def step(model: Any, batch: Any) -> Tensor:
        z = getattr(model, head)(model.table(torch.rand(4, 5)))
        return one_by_one(model, batch) + z.square().mean()

    return Method(step, table=nn.Linear(5, WIDTH), head_table=nn.Linear(WIDTH, 4))


def beside_a_table() -> Method:
    def step(model: Any, batch: Any) -> Tensor:
        z = model.head_table(model.table(torch.rand(4, 5)))
        return one_by_one(model, batch) + (model.head(model.backbone(batch[0])) - z).var()

    table = nn.Linear(5, WIDTH).requires_grad_(False)
    return Method(step, table=table, head_table=nn.Linear(WIDTH, 4))


def probed_beside() -> Method:
    """Trains a probe of its own on features that are detached."""

    def step(model: Any, batch: Any) -> Tensor:
        read = model.own_probe(model.backbone(batch[0]).detach())
        return one_by_one(model, batch) + read.square().mean()

    return Method(step, own_probe=nn.Linear(WIDTH, 4))


def mixing(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(F.normalize(model.backbone(x))) for x in batch))


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


def chained(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(model.head_before(model.backbone(x))) for x in batch))


def with_other(model: Any, batch: Any) -> Tensor:
    return one_by_one(model, batch) + model.head_other(model.backbone(batch[0])).square().mean()


def pooler() -> Encoder:
    """Gives a feature, and what a layer mixes of it."""
    backbone = Encoder(lambda self, x: (y := self.layers(x), self.pool(y)))
    backbone.pool = nn.Linear(WIDTH, WIDTH)
    return backbone


class OfADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 4)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.inner(features["y"])
        return y


def in_dicts(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head({"y": model.backbone(x)}) for x in batch))


def into_the_encoder(model: Any, batch: Any) -> Tensor:
    return apart(*(model.head(model.backbone(model.head_in(x))) for x in batch))


def run_by_a_hook() -> Any:
    """The head takes what comes before the encoder's last layer, and is run there by a hook."""
    backbone = encoder().append(nn.Linear(WIDTH, 6))
    taken: list[Tensor] = []
    kept: list[Tensor] = []

    def step(model: Any, batch: Any) -> Tensor:
        taken.clear()
        for x in batch:
            model.backbone(x)
        return apart(*taken)

    model: Any = Method(step, backbone=backbone)

    def run(layer: nn.Module, args: Any, feature: Tensor) -> None:
        kept[:] = [feature]
        if len(feature) > 1:
            taken.append(model.head(feature))

    backbone[2].register_forward_hook(run)
    model.kept = kept
    return model


def takes_what_the_hook_took() -> None:
    model = run_by_a_hook()
    fit(model, features=lambda output: model.kept[0])


def reentrant(model: Any, batch: Any, use_reentrant: bool = True) -> Tensor:
    features = [model.backbone(x) for x in batch]
    return apart(*(checkpoint(model.head, y, use_reentrant=use_reentrant) for y in features))


CASES |= {
    "a head that takes what another gives": Case(
        lambda: fit(
            Method(chained, head_before=nn.Linear(WIDTH, WIDTH)), heads=["head_before", "head"]
        ),
        r"Pass heads=\[\.\.\.\]: those that take the features themselves",
        lambda: fit(Method(chained, head_before=nn.Linear(WIDTH, WIDTH)), heads=["head_before"]),
    ),
    "channels that are mixed before the head": Case(
        lambda: fit(Method(mixing)),
        "make it a part of the head, or of the encoder",
        lambda: [
            fit(Method(head=nn.Sequential(Normalize(), nn.Linear(WIDTH, 4)))),
            fit(Method(backbone=encoder().append(Normalize()))),
        ],
    ),
    "a layer before the head": Case(
        lambda: fit(Method(chained, head_before=nn.Linear(WIDTH, WIDTH))),
        r"Pass heads=\[\.\.\.\]: every module that takes the encoder's features as they are",
        lambda: fit(Method(chained, head_before=nn.Linear(WIDTH, WIDTH)), heads=["head_before"]),
    ),
    "a loss past the heads": Case(
        lambda: fit(Method(with_other, head_other=nn.Linear(WIDTH, 1))),
        r"Pass heads=\[\.\.\.\]: every module .*head_other",
        lambda: fit(
            Method(with_other, head_other=nn.Linear(WIDTH, 1)), heads=["head", "head_other"]
        ),
    ),
    "a loss past the heads that has to be": Case(
        lambda: fit(Method(lambda m, b: one_by_one(m, b) + m.backbone(b[0]).square().mean())),
        "Or pass equivariant_dim=0 to train without a split",
        lambda: fit(
            Method(lambda m, b: one_by_one(m, b) + m.backbone(b[0]).square().mean()),
            equivariant_dim=0,
        ),
    ),
    "features that the heads don't receive": Case(
        lambda: fit(Method(taking(1), backbone=pooler()), features=lambda out: out[0]),
        "pass features=lambda output: what they receive",
        lambda: fit(Method(taking(1), backbone=pooler()), features=lambda out: out[1]),
    ),
    "a head of no tensor": Case(
        lambda: fit(Method(in_dicts, head=OfADict())),
        r"Pass heads=\[\.\.\.\]: the modules that take the encoder's features as their first",
        lambda: fit(Method(in_dicts, head=OfADict()), heads=["head.inner"]),
    ),
    "a layer before the encoder": Case(
        lambda: fit(Method(into_the_encoder, head_in=nn.Conv2d(3, 3, 1)), heads=["head_in"]),
        r"Pass heads=\[\.\.\.\]: the modules that take the encoder's features",
        lambda: fit(Method(into_the_encoder, head_in=nn.Conv2d(3, 3, 1)), heads=["head"]),
    ),
    "a head of other features, too": Case(
        lambda: fit(with_a_table("head")),
        "Give each a head of its own",
        lambda: fit(with_a_table("head_table")),
    ),
    "a head of other features": Case(
        lambda: fit(beside_a_table(), heads=["head", "head_table"]),
        r"pass heads=\[\.\.\.\] without \['head_table'\]",
        lambda: fit(beside_a_table()),
    ),
    "a probe among the heads": Case(
        lambda: fit(probed_beside(), heads=["head", "own_probe"]),
        r"If they are probes, pass heads=\[\.\.\.\] without \['own_probe'\]",
        lambda: fit(probed_beside()),
    ),
    "a head of what comes before the encoder's last layer": Case(
        lambda: fit(run_by_a_hook()),
        "another tensor than the encoder returns, pass features=lambda output: that tensor",
        takes_what_the_hook_took,
    ),
    "a head that is checkpointed": Case(
        lambda: fit(Method(reentrant)),
        r"Pass use_reentrant=False to checkpoint\(\)",
        lambda: fit(Method(partial(reentrant, use_reentrant=False))),
    ),
}

# --- the step: the views ---


def cat(model: Any, batch: Any) -> Tensor:
    return joined(model, torch.cat(list(batch)))


def in_turns(model: Any, batch: Any) -> Tensor:
    z = model.head(model.backbone(torch.stack(list(batch), 1).flatten(0, 1)))
    return apart(z[0::2], z[1::2])


def halves(model: Any, batch: Any) -> Tensor:
    x0, x1 = batch
    mixed = [torch.cat([x0[:2], x1[:2]]), torch.cat([x0[2:], x1[2:]])]
    z = torch.stack([model.head(model.backbone(x)) for x in mixed])
    return apart(z[:, :2].flatten(0, 1), z[:, 2:].flatten(0, 1))


def blanked(model: Any, batch: Any, *, copied: bool = False) -> Tensor:
    x0, x1 = (x.clone() for x in batch)
    z0, z1 = (model.head(model.backbone(x)) for x in (x0.clone() if copied else x0, x1))
    x0.zero_()
    return apart(z0, z1)


def activated(model: Any, batch: Any, *, copied: bool = False) -> Tensor:
    y0, y1 = (model.backbone(x).clone() if copied else model.backbone(x) for x in batch)
    return apart(*(model.head(F.relu(y, inplace=True)) for y in (y0, y1)))


def lazily(called: bool = False) -> Method:
    layers = nn.LazyConv2d(WIDTH, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = Method(backbone=nn.Sequential(*layers), head=nn.LazyLinear(4))
    if called:
        model.head(model.backbone(views()[0]))
    return model


def alternating(pausing: bool, first: int = 1) -> Callable[[Any, Any], Tensor]:
    """Learns from labels in each second step, from the first or the second one on."""
    turns = itertools.count()

    def step(model: Any, batch: Any) -> Tensor:
        supervised = next(turns) % 2 == first
        if pausing:
            model.recon_aux.weight = 0.0 if supervised else 1.0
        views = batch[:1] if supervised else batch
        return torch.stack([model.head(model.backbone(x)).square().mean() for x in views]).sum()

    return step


def heads_alone(pausing: bool, first: int = 1, recorded: bool = True) -> Callable[..., Tensor]:
    """Trains the heads alone in each second step."""
    turns = itertools.count()

    def step(model: Any, batch: Any) -> Tensor:
        alone = next(turns) % 2 == first
        if pausing:
            model.recon_aux.weight = 0.0 if alone else 1.0
        with torch.set_grad_enabled(recorded or not alone):
            features = [model.backbone(x) for x in batch]
        return apart(*(model.head(y.detach() if alone else y) for y in features))

    return step


def with_another(name: str, module: nn.Module, *, loaded: bool) -> None:
    """Brings other weights into a model that trains."""
    model = fit()
    if loaded:
        getattr(model, name).load_state_dict(module.state_dict())
    else:
        setattr(model, name, module)
    trains(model)


def joined_with_labelled(model: Any, batch: Any, apart_from_views: bool) -> Tensor:
    some, both = batch["labelled"], torch.cat(batch["views"])
    if apart_from_views:
        y, labelled = model.backbone(both), model.backbone(some)
    else:
        labelled, y = model.backbone(torch.cat([some, both])).split([len(some), len(both)])
    return apart(*model.head(y).chunk(2)) + model.head_labels(labelled).square().mean()


def beside_labelled(apart_from_views: bool) -> None:
    step = partial(joined_with_labelled, apart_from_views=apart_from_views)
    model = attached(Method(step, head_labels=nn.Linear(WIDTH, 2)), heads=["head", "head_labels"])
    trains(model, {"labelled": torch.rand(2, 3, 16, 16), "views": views(8)})


def taught_by_a_copy(before: bool) -> None:
    model = Loop()
    options: dict[str, Any] = {}
    if before:
        teacher = copy.deepcopy(model).requires_grad_(False)
        options = {"heads": ["head", teacher.head], "momentum_encoders": [teacher.backbone]}
    attached(model, **options)
    teacher = teacher if before else copy.deepcopy(model).requires_grad_(False)

    def step(model: Any, batch: Any) -> Tensor:
        z = model.head(model.backbone(batch[0]))
        with torch.no_grad():
            target = teacher.head(teacher.backbone(batch[1]))
        return recon_aux.add_loss(model, apart(z, target), batch)

    trains(model, list(views()), step)


def enlarging() -> nn.Module:
    """An encoder that doesn't need its images for its gradients."""
    return nn.Sequential(nn.Upsample(scale_factor=2), *encoder())


def the_same(model: Any, batch: Any) -> Tensor:
    return one_by_one(model, [batch[0], batch[0].clone()])


def one_view(model: Any, batch: Any) -> Tensor:
    return one_by_one(model, [batch[0]] * 2)


def augmented(model: Any, x: Tensor, turns: bool, size: int = 256) -> Tensor:
    """Views that are made in the step."""
    x = x[:size].repeat_interleave(2, 0) if turns else x[:size].repeat(2, 1, 1, 1)
    z = model.head(model.backbone(x + 0.05 * torch.rand_like(x)))
    return apart(z[0::2], z[1::2]) if turns else apart(*z.chunk(2))


def put_into_the_batch(model: Any, x: Tensor) -> Tensor:
    return in_turns(model, x)


def labelled(model: Any, batch: Any, first: bool) -> Tensor:
    others, x = batch

    def supervised() -> Tensor:
        return model.head_labels(model.backbone(others)).square().mean()

    loss = supervised() if first else 0.0
    z = [model.head(model.backbone(x + 0.05 * torch.rand_like(x))) for _ in range(2)]
    return apart(*z) + (loss if first else supervised())


def three_views(model: Any, x: Tensor) -> Tensor:
    """Of two thirds of the batch, so that its size fits, but isn't the views'."""
    x = x[: len(x) * 2 // 3].repeat(3, 1, 1, 1)
    return joined(model, x + 0.05 * torch.rand_like(x), 3)


class Momentum(Method):
    """The second view goes through a momentum encoder, as ``change`` makes it."""

    def __init__(self, change: Any = None, step: Any = None, **others: Any) -> None:
        super().__init__(step or Momentum.step_of, **others)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.head_momentum = copy.deepcopy(self.head).requires_grad_(False)
        self.change = change or (lambda x: x)

    @staticmethod
    def step_of(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            key = model.head_momentum(model.backbone_momentum(model.change(batch[1])))
        return apart(model.head(model.backbone(batch[0])), key)


def noisy(x: Tensor) -> Tensor:
    return x + 0.05 * torch.rand_like(x)


class Taught(Method):
    """The other view goes through a teacher that isn't in the model; or both do."""

    def __init__(self, both: bool = False, built: Any = encoder) -> None:
        super().__init__(Taught.step_of)
        self.both = both
        self.outside = [built().requires_grad_(False), copy.deepcopy(self.head)]

    @staticmethod
    def step_of(model: Any, batch: Any) -> Tensor:
        teacher, its_head = model.outside
        with torch.no_grad():
            key = its_head(teacher(batch[1]))
        z = [model.head(model.backbone(x)) for x in (batch if model.both else batch[:1])]
        return sum(apart(x, key) for x in z)  # type: ignore[return-value]


def taught(both: bool, named: bool) -> None:
    model = Taught(both)
    teacher, its_head = model.outside
    options = {"heads": ["head", its_head], "momentum_encoders": [teacher]} if named else {}
    fit(model, **options)


def own_target(model: Any, batch: Any, masked: bool = False) -> Tensor:
    with torch.no_grad():
        y = model.backbone(batch[1])
        target = model.head_target(y)
    return apart(model.head(model.backbone(batch[0])), target)


def has_target() -> Method:
    return Method(own_target, head_target=nn.Linear(WIDTH, 4).requires_grad_(False))


MANY = 256

CASES |= {
    "images that take turns in the step": Case(
        lambda: fit(Method(partial(augmented, turns=True)), torch.rand(MANY, 3, 16, 16)),
        "pass .*; if they take turns, image by image, pass interleaved=True",
        lambda: [
            fit(
                Method(partial(augmented, turns=True)),
                torch.rand(MANY, 3, 16, 16),
                interleaved=True,
            ),
            # or put the views into the batch
            fit(Method(in_turns), views(MANY)),
        ],
    ),
    "labelled images before the views": Case(
        lambda: fit(
            Method(partial(labelled, first=True), head_labels=nn.Linear(WIDTH, 2)),
            torch.rand(2, MANY, 3, 16, 16),
            heads=["head", "head_labels"],
        ),
        "Encode the views first, one by one, then other images, as labelled ones",
        lambda: fit(
            Method(partial(labelled, first=False), head_labels=nn.Linear(WIDTH, 2)),
            torch.rand(2, MANY, 3, 16, 16),
            heads=["head", "head_labels"],
        ),
    ),
    "three views of a part of the batch": Case(
        lambda: fit(Method(three_views), torch.rand(384, 3, 16, 16)),
        "If one call gets several views concatenated, pass views= how many",
        lambda: fit(Method(three_views), torch.rand(384, 3, 16, 16), views=3),
    ),
    "the same images twice": Case(
        lambda: fit(Method(the_same)), "Call the encoder once for each whole view", fit
    ),
    "views in other arrangements": Case(
        lambda: fit(Method(halves)),
        "Call the encoder once for each whole view, or once with all views, one after the other",
        lambda: [fit(), fit(Method(cat))],
    ),
    "views in other arrangements, once more": Case(
        lambda: fit(Method(halves)),
        "If they take turns in one call, image by image, pass interleaved=True",
        lambda: fit(Method(in_turns), interleaved=True),
    ),
    "views of two sizes": Case(
        lambda: fit(batch=[*views()[:1], *views(side=12)[1:]]), "Make two views of one size", fit
    ),
    "views of other channels than each other's": Case(
        lambda: fit(two_stems(), views(channels=2)[:1] + views()[1:]),
        "Make two views of one size, with as many images and channels",
        lambda: fit(two_stems()),
    ),
    "a view that is changed after it was encoded": Case(
        lambda: fit(Method(blanked, backbone=enlarging())),
        r"Encode a copy of it: encoder\(view\.clone\(\)\)\.",
        lambda: fit(Method(partial(blanked, copied=True), backbone=enlarging())),
    ),
    "a feature that is changed after it was returned": Case(
        lambda: fit(Method(activated)),
        r"Make a copy first: y = encoder\(view\)\.clone\(\)\.",
        lambda: fit(Method(partial(activated, copied=True))),
    ),
    "layers whose sizes aren't known yet": Case(
        lambda: fit(lazily()),
        r"Call the encoder and its heads on images once, then attach\.",
        lambda: fit(lazily(called=True)),
    ),
    "a supervised step among the others": Case(
        lambda: trains(attached(Method(alternating(pausing=False))), count=4),
        r"For a step without two views, .* make model\.recon_aux\.weight 0 in it\.",
        lambda: trains(attached(Method(alternating(pausing=True))), count=4),
    ),
    "a step without two views comes first": Case(
        lambda: trains(attached(Method(alternating(pausing=False, first=0))), count=4),
        r"For a step without two views, .* make model\.recon_aux\.weight 0 in it\.",
        lambda: trains(attached(Method(alternating(pausing=True, first=0))), count=4),
    ),
    "a step that trains the heads alone": Case(
        lambda: trains(attached(Method(heads_alone(pausing=False))), count=4),
        r"To train the heads alone, make model\.recon_aux\.weight 0 in such steps",
        lambda: trains(attached(Method(heads_alone(pausing=True))), count=4),
    ),
    "a first step that trains the heads alone, without gradient": Case(
        lambda: trains(attached(Method(heads_alone(False, first=0, recorded=False))), count=4),
        r"To train the heads alone in some steps, make model\.recon_aux\.weight 0 in them",
        lambda: trains(attached(Method(heads_alone(True, first=0, recorded=False))), count=4),
    ),
    "a first step that trains the heads alone": Case(
        lambda: trains(attached(Method(heads_alone(False, first=0))), count=4),
        r"A warm-up of the heads needs encoder\.requires_grad_\(False\)",
        lambda: trains(attached(Method(heads_alone(True, first=0))), count=4),
    ),
    "a head that was replaced since": Case(
        lambda: with_another("head", nn.Linear(WIDTH, 4), loaded=False),
        r"Since attach, \['head'\] was replaced: load new weights into the old module",
        lambda: with_another("head", nn.Linear(WIDTH, 4), loaded=True),
    ),
    "an encoder that was replaced since": Case(
        lambda: with_another("backbone", encoder(), loaded=False),
        r"Since attach, \['backbone'\] was replaced: load new weights into the old module",
        lambda: with_another("backbone", encoder(), loaded=True),
    ),
    "labelled images before the views, in one call": Case(
        lambda: beside_labelled(apart_from_views=False),
        "Encode labelled images in a call of their own",
        lambda: beside_labelled(apart_from_views=True),
    ),
    "a copy of the attached model": Case(
        lambda: taught_by_a_copy(before=False),
        r"make it before attach, and pass momentum_encoders=\[it\]",
        lambda: taught_by_a_copy(before=True),
    ),
    "one view alone": Case(lambda: fit(Method(one_view)), "Encode the other view, too", fit),
    "views that are joined, where the batch doesn't show it": Case(
        lambda: trains(attached(Method(cat)), step=opaque),
        "pass views= how many",
        lambda: trains(attached(Method(cat), views=2), step=opaque),
    ),
    "a momentum encoder's view that is made in the step": Case(
        lambda: fit(Momentum(noisy)),
        "If they are in the order of the encoder's own, pass views=1",
        lambda: fit(Momentum(noisy), views=1),
    ),
    "a momentum encoder's view that is made in the step, once more": Case(
        lambda: fit(Momentum(noisy)),
        "Else put the views into the batch",
        lambda: fit(Momentum(), [x := views()[0], noisy(x)]),
    ),
    "a loop's joined views, without their batch": Case(
        lambda: loop(step=lambda m, b: recon_aux.add_loss(m, cat(m, b))),
        r"Encode both views, then call add_loss\(model, loss, batch\) with their batch",
        lambda: loop(step=lambda m, b: recon_aux.add_loss(m, cat(m, b), b)),
    ),
    "DINO in a loop, without its batch": Case(
        lambda: loop(with_momentum(), step=joined_by_momentum),
        r"pass views= how many",
        lambda: loop(with_momentum(), step=joined_by_momentum, views=2),
    ),
    "GradCache, each chunk of a view with its own add_loss": Case(
        lambda: loop(step=partial(grad_cache, both=False)),
        r"Encode both views, then call add_loss\(model, loss, batch\)",
        lambda: loop(step=partial(grad_cache, both=True)),
    ),
    "a teacher outside, of the other view": Case(
        lambda: taught(both=False, named=False),
        r"pass momentum_encoders=\[it\], and heads=\[\.\.\.\] with its heads\.",
        lambda: taught(both=False, named=True),
    ),
    "a teacher outside": Case(
        lambda: taught(both=True, named=False),
        r"Pass momentum_encoders=\[it\], and heads=\[\.\.\.\] with its heads, too",
        lambda: taught(both=True, named=True),
    ),
    "a head of targets": Case(
        lambda: fit(has_target()),
        r"Pass heads=\[\.\.\.\] with the heads that take it, too",
        lambda: fit(has_target(), heads=["head", "head_target"]),
    ),
    "a head of targets, once more": Case(
        lambda: fit(has_target()),
        "Or pass equivariant_dim=0 to train without a split",
        lambda: fit(has_target(), equivariant_dim=0),
    ),
}


def opaque(model: Any, batch: Any) -> Tensor:
    """A batch in which nothing can be seen."""
    return model.training_step(Opaque(batch), 0)


class Opaque:
    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)


def with_momentum() -> Loop:
    model = Loop()
    model.backbone_momentum = copy.deepcopy(model.backbone).requires_grad_(False)
    model.head_momentum = copy.deepcopy(model.head).requires_grad_(False)
    return model


def grad_cache(model: Any, batch: Any, both: bool) -> Tensor:
    """Embeds all in chunks, without gradient, then each chunk again, with its gradient."""
    chunks = [x.chunk(2) for x in batch]
    with torch.no_grad():
        z = [torch.cat([model.head(model.backbone(x)) for x in some]) for some in chunks]
    z = [x.requires_grad_() for x in z]
    gradients = [g.chunk(2) for g in torch.autograd.grad(apart(*z), z)]

    def surrogate(view: int, chunk: int) -> Tensor:
        again = model.head(model.backbone(chunks[view][chunk]))
        return (again * gradients[view][chunk]).sum()

    if both:
        losses = [recon_aux.add_loss(model, surrogate(0, i) + surrogate(1, i)) for i in (0, 1)]
    else:
        losses = [recon_aux.add_loss(model, surrogate(v, i)) for v in (0, 1) for i in (0, 1)]
    return torch.stack(losses).sum()


def joined_by_momentum(model: Any, batch: Any) -> Tensor:
    x = torch.cat(batch)
    with torch.no_grad():
        keys = model.head_momentum(model.backbone_momentum(x))
    return recon_aux.add_loss(
        model, apart(model.head(model.backbone(x)), keys.roll(len(x) // 2, 0))
    )


# --- the step: what it returns, and training past it ---


def past_it(model: Any, batch: Any) -> Tensor:
    """A training_step that was kept before attaching."""
    return one_by_one(model, batch)


def replaced_before() -> None:
    model: Any = Method()
    model.training_step = lambda batch, batch_idx: past_it(model, batch)
    fit(model)


def detached_first() -> None:
    model = recon_aux.detach(attached())
    optimizer = model.configure_optimizers()
    for _ in range(3):
        past_it(model, views()).backward()
        optimizer.step()


def forgetful(model: Any, batch: Any) -> Tensor:
    return one_by_one(model, batch)


def evaluated(model: Any, batch: Any) -> Tensor:
    """Many calls between steps."""
    model.eval()
    with torch.no_grad():
        for _ in range(40):
            model.backbone(batch[0])
    return with_loss(model.train(), batch)


def detached_loop() -> None:
    model = recon_aux.detach(attached(Loop()))
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(40):
        one_by_one(model, views()).backward()
        optimizer.step()


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class Whole(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def distributed(unused: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, process_group(Path(folder)):
        model = attached(Whole())
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
        trains(
            model,
            step=lambda m, b: recon_aux.add_loss(m, apart(*wrapped(torch.cat(b)).chunk(2)), b),
        )


def compiled_together(**options: Any) -> None:
    torch._dynamo.reset()
    model = attached(Whole(), **options)
    called: Any = torch.compile(model, backend="aot_eager")
    try:
        trains(model, step=lambda m, b: recon_aux.add_loss(m, apart(*(called(x) for x in b))))
    finally:
        torch._dynamo.reset()


CASES |= {
    "a step that returns no loss": Case(
        lambda: fit(Method(lambda m, b: {"total": one_by_one(m, b)})),
        "Return the loss as a tensor",
        fit,
    ),
    "optimization by hand that begins later": Case(
        lambda: switched_by_hand(attached()).training_step(views(), 0),
        r"Or call recon_aux\.ReconAux in the step",
        own_step_with_the_task,
    ),
    "a step past the attached one": Case(
        lambda: trains(attached(), step=past_it, count=3),
        "Replace training_step before attaching",
        replaced_before,
    ),
    "a step past the attached one, once more": Case(
        lambda: trains(attached(), step=past_it, count=3),
        r"Or take all off: recon_aux\.detach\(model\)",
        detached_first,
    ),
    "add_loss where a training_step adds it": Case(
        lambda: trains(attached(), step=lambda m, b: recon_aux.add_loss(m, m.training_step(b, 0))),
        "Leave add_loss out",
        fit,
    ),
    "a loss for each image": Case(
        lambda: loop(step=lambda m, b: recon_aux.add_loss(m, one_by_one(m, b).expand(4))),
        r"one number as loss, got \(4,\). Pass its mean",
        loop,
    ),
    "a number in place of the loss": Case(
        lambda: loop(step=lambda m, b: recon_aux.add_loss(m, one_by_one(m, b).item())),  # type: ignore[arg-type]
        r"Pass the loss that backward\(\) is called on",
        loop,
    ),
    "a loop that forgets the loss": Case(
        lambda: loop(step=forgetful), "Call add_loss in each step", loop
    ),
    "an evaluation with gradient": Case(
        lambda: [m := attached(Loop()), [m.backbone(views()[0]) for _ in range(40)]],
        r"Around calls .*, as an evaluation's or .*, use model\.eval\(\), and torch\.no_grad\(\)",
        lambda: loop(step=evaluated),
    ),
    "a loop that trains on without the task": Case(
        lambda: loop(step=forgetful),
        r"To train on without the task: recon_aux\.detach\(model\)",
        detached_loop,
    ),
    "a search for unused parameters": Case(
        lambda: distributed(unused=True),
        "Pass find_unused_parameters=False",
        lambda: distributed(unused=False),
    ),
    "gradients within compiled code": Case(
        compiled_together,
        r"Pass weight=1\.0, or another number",
        lambda: compiled_together(weight=1.0),
    ),
}

# --- the probe, and what is installed ---

LABELLED = (torch.rand(16, 3, 8, 8), torch.arange(16) % 2)


def probed(encode: Callable[[Tensor], Tensor], **options: Any) -> None:
    options = {"pairs": (8, 8), **options}
    result = probe(encode, LABELLED, LABELLED, equivariant_dim=1, **options)
    assert set(result.parts) == {"whole", "invariant", "equivariant"}


def probe_images(images: Any, **options: Any) -> None:
    split = (images, None)
    probe(lambda x: x.mean((2, 3)), split, split, pairs=(8, 8), **options)


def probe_labels(labels: Any) -> None:
    split = (LABELLED[0], labels)
    probe(lambda x: x.mean((2, 3)), split, split, pairs=(8, 8))


def compared(model: nn.Module) -> None:
    compare({"mine": model}, LABELLED, LABELLED, pairs=(8, 8))


def imported(name: str, without: str = "") -> None:
    """Import a module anew, as if something weren't installed."""
    missing = {without: None} if without else {}
    package, _, own = name.rpartition(".")
    # the package, too, gets back what it had
    with patch.dict(sys.modules, missing), patch.object(sys.modules[package], own, create=True):
        sys.modules.pop(name, None)
        importlib.import_module(name)


CASES |= {
    "a transformation that isn't there": Case(
        lambda: draw_parameters(2, ["shear"]),
        r"names among \['rotation', .*Pass some of those",
        lambda: draw_parameters(2, ["rotation"]),
    ),
    "a regressor that isn't there": Case(
        lambda: probed(lambda x: x.mean((2, 3)), regressor="forest"),
        r"regressor= to be one of \('ridge', 'mlp'\), got 'forest'. Pass one of them",
        lambda: probed(lambda x: x.mean((2, 3)), regressor="ridge"),
    ),
    "images without their labels": Case(
        lambda: probe(lambda x: x.mean((2, 3)), LABELLED[0], LABELLED[0], pairs=(8, 8)),  # type: ignore[arg-type]
        r"train as \(images, labels\), got Tensor. Pass a tuple .*or \(images, None\)",
        lambda: probe(
            lambda x: x.mean((2, 3)), (LABELLED[0], None), (LABELLED[0], None), pairs=(8, 8)
        ),
    ),
    "images whose channels are last": Case(
        lambda: probe_images(LABELLED[0].movedim(1, -1).numpy()),
        r"\(N, 3, H, W\), got \(16, 8, 8, 3\).*torch.as_tensor\(images\).movedim\(-1, 1\)",
        lambda: probe_images(torch.as_tensor(LABELLED[0].movedim(1, -1).numpy()).movedim(-1, 1)),
    ),
    "grey images": Case(
        lambda: probe_images(LABELLED[0][:, :1]),
        r"Pass such: .*torch.as_tensor\(images\).expand\(-1, 3, -1, -1\) of grey ones",
        lambda: probe_images(LABELLED[0][:, :1].expand(-1, 3, -1, -1)),
    ),
    "images from 0 to 255 as floats": Case(
        lambda: probe_images(LABELLED[0] * 255),
        r"floats from 0 to 1, got torch.float32 from .* to 25\d.*\. Divide them by 255",
        lambda: probe_images(LABELLED[0] * 255 / 255),
    ),
    "images from 0 to 255 as whole numbers": Case(
        lambda: probe_images((LABELLED[0] * 255).long()),
        r"got torch.int64 .*Pass images\.to\(torch\.uint8\)",
        lambda: probe_images((LABELLED[0] * 255).long().to(torch.uint8)),
    ),
    "images of 0 and 1 as whole numbers": Case(
        lambda: probe_images((LABELLED[0] > 0.5).to(torch.uint8)),
        r"got torch.uint8 from 0 to 1\. Pass images\.float\(\)",
        lambda: probe_images((LABELLED[0] > 0.5).to(torch.uint8).float()),
    ),
    "images of 16 bits": Case(
        lambda: probe_images((LABELLED[0] * 65535).to(torch.uint16)),
        "Divide them, as floats, by the largest value that they may have, as 65535",
        lambda: probe_images((LABELLED[0] * 65535).to(torch.uint16).float() / 65535),
    ),
    "a file of floats": Case(
        lambda: with_eight_bits(Image.fromarray(np.ones((2, 2), np.float32))),
        "got mode F from 1 to 1. Save it with 8 bits",
        lambda: with_eight_bits(Image.fromarray(np.ones((2, 2), np.uint8))),
    ),
    "one image": Case(
        lambda: probe_images(LABELLED[0][:1]),
        "two images or more in train, got 1. Pass more images",
        lambda: probe_images(LABELLED[0][:2]),
    ),
    "one pair": Case(
        lambda: probed(lambda x: x.mean((2, 3)), pairs=(8, 1)),
        r"pairs= as two whole numbers of 2 or more, got \(8, 1\). Pass such",
        lambda: probed(lambda x: x.mean((2, 3)), pairs=(8, 2)),
    ),
    "labels as floats": Case(
        lambda: probe_labels(LABELLED[1].float()),
        r"got torch.float32 of shape \(16,\). Pass such: labels.long\(\) of floats",
        lambda: probe_labels(LABELLED[1].float().long()),
    ),
    "a column for each class": Case(
        lambda: probe_labels(F.one_hot(LABELLED[1])),
        r"of shape \(16, 2\). Pass such: .*labels.argmax\(1\) of one column for each class",
        lambda: probe_labels(F.one_hot(LABELLED[1]).argmax(1)),
    ),
    "a list of images of several sizes": Case(
        lambda: probe_images([*LABELLED[0], torch.rand(3, 9, 9)]),
        "train's images of one size, got .* Pass images that were resized to one",
        lambda: probe_images([*LABELLED[0], F.interpolate(torch.rand(1, 3, 9, 9), 8)[0]]),
    ),
    "labels that are names": Case(
        lambda: probe_labels(["cat", "dog"] * 8),
        r"If they are names, pass numpy.unique\(labels, return_inverse=True\)\[1\]",
        lambda: probe_labels(np.unique(["cat", "dog"] * 8, return_inverse=True)[1]),
    ),
    "labels of one class": Case(
        lambda: probe_labels(torch.zeros(16, dtype=torch.int64)),
        "two classes or more, got 0 alone. Pass None in their place",
        lambda: probe_labels(None),
    ),
    "an encoder that returns several things": Case(
        lambda: probed(lambda images: (images.mean((2, 3)), 1)),  # type: ignore[arg-type, return-value]
        r"Pass a function that takes it from there, as lambda images: encoder\(images\)\[0\]",
        lambda: probed(lambda images: (images.mean((2, 3)), 1)[0]),
    ),
    "a feature that isn't finite": Case(
        lambda: probed(lambda images: images.mean((2, 3)) / 0),
        "for 16 of 16 images. Pass images as in the training, and look for NaN",
        lambda: probed(lambda images: images.mean((2, 3))),
    ),
    "a model with a head, whose encoder has a name of its own": Case(
        lambda: compared(nn.ModuleDict({"net": encoder(), "projector": nn.Linear(WIDTH, 2)})),
        r"got 'mine', a ModuleDict with net \(Sequential\), projector .* Pass its encoder alone",
        lambda: compared(encoder()),
    ),
    "a model with a projection, whose encoder has a name of its own": Case(
        lambda: compared(nn.ModuleDict({"net": encoder(), "projection": nn.Linear(WIDTH, 2)})),
        r"net \(Sequential\), projection .* Pass its encoder alone",
        lambda: compared(encoder()),
    ),
    "normalised images": Case(
        lambda: probe_images(transforms.Normalize([0.5] * 3, [0.25] * 3)(LABELLED[0])),
        "Leave Normalize out of their transform, and pass it as normalize=",
        lambda: probe_images(LABELLED[0], normalize=transforms.Normalize([0.5] * 3, [0.25] * 3)),
    ),
    "a mean and a deviation for normalize=": Case(
        lambda: probe_images(LABELLED[0], normalize=([0.5] * 3, [0.25] * 3)),
        r"normalize= as a function of images, got tuple. Pass normalize=torchvision.transforms",
        lambda: probe_images(LABELLED[0], normalize=transforms.Normalize([0.5] * 3, [0.25] * 3)),
    ),
    "a set of transformations that isn't there": Case(
        lambda: probed(lambda x: x.mean((2, 3)), transformations="shear"),
        r"transformations= to be one of \['standard', .*Pass one of them",
        lambda: probed(lambda x: x.mean((2, 3)), transformations="unseen"),
    ),
    "features of five dimensions": Case(
        lambda: probed(lambda x: x.mean((2, 3))[..., None, None, None]),
        r"Pass them flattened, \(B, D\)",
        lambda: probed(lambda x: x.mean((2, 3))),
    ),
    "the probe without its packages": Case(
        lambda: imported("recon_aux.probe", without="kornia"),
        r"install it with, in a clone: pip install '\.\[probe\]'",
        lambda: imported("recon_aux.probe"),
    ),
    "lightly's adapter without lightly": Case(
        lambda: imported("recon_aux.integrations.lightly", without="lightly.models.modules.heads"),
        r"install it with, in a clone: pip install '\.\[lightly\]'",
        lambda: imported("recon_aux.integrations.lightly"),
    ),
    "torchgeo isn't installed": Case(
        lambda: imported("recon_aux.integrations.torchgeo", without="torchgeo"),
        r"install it with, in a clone: pip install '\.\[torchgeo\]'",
        lambda: imported("recon_aux.integrations.torchgeo"),
    ),
    # these say what was done, and ask for nothing
    "a checkpoint of a bare model": Case(
        lambda: resumed(Method().state_dict()),
        "the decoder starts as it is",
        lambda: resumed(saved()),
    ),
    "an average of checkpoints": Case(
        lambda: resumed({**saved(), "recon_aux._extra_state": torch.zeros(1024)}),
        "the saved options can't be read",
        lambda: resumed(saved()),
    ),
}

# --- the rule ---

# what tells the reader to do something
IMPERATIVE = re.compile(
    r"\b([Pp]ass|[Mm]ake|[Cc]all|[Ll]eave|[Bb]uild|[Rr]eturn|[Gg]ive|[Pp]ut|[Ee]ncode|[Rr]eplace|"
    r"[Mm]ove|[Ll]ist|[Ll]oad|[Ll]et|[Ll]ook|[Ll]ower|[Ii]nstall|attach|use|needs|did you mean|"
    r"[Dd]ivide|[Ss]ave|has to|recon_aux\.detach)\b"
)
# notices that ask for nothing, and what has no way out of it
WITHOUT_ADVICE = {
    "another decoder",
    "other options",
    "a checkpoint of a bare model",
    "an average of checkpoints",
}
# tests of what no case here can bring about, by file and by how the message starts
COVERED_ELSEWHERE = {
    ("recon_aux/task/gradients.py", "expected the loss to use all"): (
        "task/test_gradients.py",
        "test_a_parameter_that_no_loss_uses_is_refused",
    ),
    ("recon_aux/task/gradients.py", "recon_aux: expected a backward pass"): (
        "task/test_gradients.py",
        "test_a_gradient_of_a_gradient_is_refused",
    ),
    ("integrations/lightly_train.py", "recon_aux.integrations.lightly_train needs"): (
        "integrations/test_lightly_train.py",
        "test_where_lightly_train_is_not_installed",
    ),
    ("integrations/lightly_train.py", "expected LightlyTrain 0.18"): (
        "integrations/test_lightly_train.py",
        "test_a_version_that_builds_its_methods_another_way_is_refused",
    ),
    ("integrations/lightly_train.py", "expected recon_aux= as a dict"): (
        "integrations/test_lightly_train.py",
        "test_unknown_options_are_refused_before_anything_is_written",
    ),
    ("integrations/lightly_train.py", "expected a method that encodes two views"): (
        "integrations/test_lightly_train.py",
        "test_methods_without_two_views_are_refused_before_anything_is_written",
    ),
    ("integrations/lightly_train.py", "expected: python -m recon_aux"): (
        "integrations/test_lightly_train.py",
        "test_other_commands_are_refused",
    ),
    ("integrations/stable_pretraining.py", "recon_aux.integrations.stable_pretraining needs"): (
        "integrations/test_stable_pretraining.py",
        "test_where_the_package_is_missing_the_error_says_what_to_install",
    ),
    ("integrations/solo_learn.py", "recon_aux.integrations.solo_learn needs"): (
        "integrations/test_solo_learn.py",
        "test_a_script_runs_with_every_method_attached",
    ),
    ("integrations/solo_learn.py", "expected recon_aux.OPTION=VALUE"): (
        "integrations/test_solo_learn.py",
        "test_a_section_of_the_config_is_the_options",
    ),
    ("integrations/solo_learn.py", "expected solo-learn 1.0.6"): (
        "integrations/test_solo_learn.py",
        "test_scripts_of_an_older_version_are_refused",
    ),
    ("integrations/solo_learn.py", "expected: python -m recon_aux"): (
        "integrations/test_solo_learn.py",
        "test_a_script_that_is_not_there",
    ),
}

Place = tuple[str, int]


class Refusal(NamedTuple):
    """A statement that raises or warns: its file, its lines, and how its message starts."""

    file: str
    lines: range
    message: str


def refusals() -> list[Refusal]:
    """All statements of ours that raise or warn, but not what raises another's error again."""
    rooms = [ROOT / "recon_aux" / room for room in ("engine", "task", "probe")]
    paths = [path for room in rooms for path in sorted(room.rglob("*.py"))]
    return [
        refusal
        for path in [*paths, *sorted((ROOT / "integrations").glob("*.py"))]
        for refusal in refusals_in(path.read_text(), str(path.relative_to(ROOT)))
    ]


def refusals_in(source: str, file: str) -> Iterator[Refusal]:
    for node in ast.walk(ast.parse(source)):
        made = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(made, ast.Call) or not isinstance(node, (ast.Raise, ast.Call)):
            continue
        name = ast.unparse(made.func)
        # Python's own way to say that there is no such attribute
        is_refusal = isinstance(node, ast.Raise) and name != "AttributeError"
        if is_refusal or name in ("warnings.warn", "warn"):
            assert made.end_lineno is not None
            words = [x.value for x in ast.walk(made) if isinstance(x, ast.Constant)]
            text = next((x for x in words if isinstance(x, str)), "")
            yield Refusal(file, range(node.lineno, made.end_lineno + 1), text)


def place_of(error: BaseException) -> Place | None:
    """The file and line of ours that raised, or warned."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename).resolve()
        if path.is_relative_to(ROOT / "recon_aux") or path.is_relative_to(ROOT / "integrations"):
            found = str(path.relative_to(ROOT)), trace.tb_lineno
        trace = trace.tb_next
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_advice_of_a_refusal_leads_out(name: str) -> None:
    message, _ = refused(name)
    found = re.search(CASES[name].advice, message)
    assert found, message
    assert bool(IMPERATIVE.search(found[0])) != (name in WITHOUT_ADVICE), found[0]
    with ours_as_errors():
        CASES[name].followed()


def test_an_error_that_is_kept_is_in_nobodys_way() -> None:
    # as a notebook keeps the last one, with what was half built
    error = error_of("a choice")
    CASES["a choice"].followed()
    assert error.__traceback__ is not None


@cache
def refused(name: str) -> tuple[str, Place | None]:
    """Give the message of a case's error, or warning, and where it comes from."""
    error = error_of(name)
    return str(error), place_of(error)


def error_of(name: str) -> Exception:
    with ours_as_errors():
        try:
            CASES[name].refused()
        except Exception as error:
            return error
    raise AssertionError(f"{name} is not refused")


@contextmanager
def ours_as_errors() -> Iterator[None]:
    """Raise what would be warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "recon_aux: ")
        yield


def test_each_refusal_has_a_case() -> None:
    hit = {refused(name)[1] for name in CASES}
    uncovered = {
        f"{refusal.file}:{refusal.lines[0]} {refusal.message}"
        for refusal in refusals()
        if not any((refusal.file, line) in hit for line in refusal.lines)
        and not any(
            refusal.file == file and refusal.message.startswith(start)
            for file, start in COVERED_ELSEWHERE
        )
    }
    assert uncovered == set()


def test_what_is_covered_elsewhere_is_there() -> None:
    known = refusals()
    for (file, start), (test_file, test) in COVERED_ELSEWHERE.items():
        assert any(x.file == file and x.message.startswith(start) for x in known), start
        assert f"def {test}(" in (ROOT / "tests" / test_file).read_text()


def test_statements_that_raise_or_warn_are_seen() -> None:
    source = """
def f(x):
    if x:
        raise ValueError(
            f"expected {x}"
        )
    try:
        warnings.warn("recon_aux: " + x)
    except KeyError as error:
        raise
    raise AttributeError(x)
"""
    assert [(list(r.lines), r.message) for r in refusals_in(source, "a.py")] == [
        ([4, 5, 6], "expected "),
        ([8], "recon_aux: "),
    ]
