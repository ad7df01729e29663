"""TorchGeo's self-supervised tasks: each attaches by one line, with any number of bands."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import recon_aux
from helpers.geo import augmentation, byol_of, task_class
from helpers.watching import rebuilt_from
from helpers.weights import assert_same, assert_trained, decoder_of, weights_of
from recon_aux.integrations.torchgeo import attach

SIDE, WIDTH = 32, 512
SMALL: dict[str, Any] = {"hidden_dim": 64, "output_dim": 32, "memory_bank_size": 64}
TASKS: dict[str, dict[str, Any]] = {
    "SimCLRTask version 1": {**SMALL, "layers": 2, "memory_bank_size": 0},
    "SimCLRTask version 2": SMALL,
    # the memory bank is as wide as what it keeps: the encoder's features
    "MoCoTask version 1": {**SMALL, "output_dim": WIDTH},
    "MoCoTask version 2": SMALL,
    "MoCoTask version 3": {**SMALL, "memory_bank_size": 0},
    "BYOLTask": {},
}
every_task = pytest.mark.parametrize("name", TASKS)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """A task and its trainer hold each other, and few objects hold many megabytes."""
    yield
    gc.collect()


def task_of(name: str, bands: int = 3) -> Any:
    torch.manual_seed(0)
    kind, _, version = name.partition(" version ")
    options = {"version": int(version), "size": SIDE} if version else {}
    made = task_class(kind)("resnet18", in_channels=bands, **options, **TASKS[name])
    if kind == "BYOLTask":
        made.model.augment = augmentation(SIDE)
    return made


def encoder_of(task: Any) -> Any:
    return task.model.backbone.model if hasattr(task, "model") else task.backbone


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *batch: Any) -> None:
        self.losses.append(outputs["loss"].detach())


def fit(task: Any, bands: int = 3, steps: int = 2) -> list[Tensor]:
    """Steps on images as TorchGeo's data sets give them; their losses."""
    torch.manual_seed(1)
    scenes: Any = [{"image": torch.rand(bands, SIDE, SIDE)} for _ in range(4 * steps)]
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    kept = Losses()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[kept], enable_model_summary=False, **quiet
    )
    trainer.fit(task, DataLoader(scenes, 4))
    return kept.losses


@slow
@every_task
def test_a_task_trains_its_encoder_and_the_whole_decoder(name: str) -> None:
    bands = 13
    task = task_of(name, bands)
    assert attach(task) is task
    assert task.recon_aux.image_channels == bands
    assert task.recon_aux.splitter.feature_dim == WIDTH
    seen, decoder, encoder = rebuilt_from(task), decoder_of(task), weights_of(encoder_of(task))
    fit(task, bands, steps=4)
    assert_trained(task, decoder)
    # BYOL's encoder has a classifier, which nothing trains
    now = {n: w for n, w in weights_of(encoder_of(task)).items() if not n.startswith("fc.")}
    assert [n for n, w in now.items() if torch.equal(w, encoder[n])] == []
    assert len(seen) == 4
    for (x0, x1), (y0, y1) in seen:
        assert x0.shape == x1.shape == (4, bands, SIDE, SIDE)
        assert not torch.equal(x0, x1)
        assert y0.shape == y1.shape == (4, WIDTH)


@slow
@every_task
def test_the_methods_loss_does_not_see_the_equivariant_channels(name: str) -> None:
    def losses(noise: float, **options: Any) -> list[Tensor]:
        task = attach(task_of(name), weight=0, **options)

        def add_noise(module: Any, args: Any, output: Tensor) -> Tensor:
            added = noise * torch.linspace(-1, 1, output.numel()).view_as(output)
            return torch.cat([output[:, : WIDTH // 2], (output + added)[:, WIDTH // 2 :]], 1)

        for encoder in (encoder_of(task), getattr(task, "backbone_momentum", None)):
            if encoder is not None:
                # before the hook by which BYOL runs its head
                encoder.global_pool.register_forward_hook(add_noise, prepend=True)
        return fit(task)

    assert losses(0.0) == losses(3.0)
    assert losses(0.0, equivariant_dim=0) != losses(3.0, equivariant_dim=0)


@slow
@every_task
def test_a_task_can_be_copied_and_detached(name: str) -> None:
    bare, task = task_of(name), attach(task_of(name))
    twin = copy.deepcopy(task)
    assert fit(twin) == fit(task)
    assert recon_aux.detach(twin) is twin
    assert twin.state_dict().keys() == bare.state_dict().keys()
    fresh = recon_aux.detach(attach(task_of(name)))
    fit(fresh)
    fit(bare)
    assert_same(weights_of(fresh), weights_of(bare))


@every_task
def test_a_refused_task_stays_as_it_was(name: str) -> None:
    def attributes(task: Any) -> dict[str, set[str]]:
        return {name: set(vars(module)) for name, module in task.named_modules()}

    task = task_of(name)
    before = attributes(task)
    with pytest.raises(ValueError, match="weight"):
        attach(task, weight=-1)
    assert attributes(task) == before
    attach(task)
    assert attributes(task) != before


MAPS = {
    "channels last": lambda: SwinTransformer(
        96, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=2
    ),
    "channels first": lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=2),
}


@slow
@pytest.mark.parametrize("kind", MAPS)
def test_byol_splits_the_channels_of_a_map(kind: str) -> None:
    torch.manual_seed(0)
    encoder: Any = MAPS[kind]()
    task = task_of("BYOLTask")
    task.model = byol_of(encoder, side=96)
    attach(task)
    width = encoder.num_features
    assert task.recon_aux.splitter.feature_dim == width
    received: list[Tensor] = []
    projector = task.model.backbone.projector.mlp[0]
    projector.register_forward_pre_hook(lambda module, args: received.append(args[0].detach()))
    before = decoder_of(task)
    fit(task)
    assert_trained(task, before)
    for flat in received:
        last = flat.unflatten(1, (-1, width) if kind == "channels last" else (width, -1))
        channels = last.movedim(-1 if kind == "channels last" else 1, 0)
        assert channels[: width // 2].any() and not channels[width // 2 :].any()
    assert received


def test_a_task_of_ones_own_may_join_its_views() -> None:
    class Own(task_class("BaseTask")):  # type: ignore[misc]
        def configure_models(self) -> None:
            pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), *pool)
            self.projector = nn.Linear(8, 4)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x = batch["image"]
            p, q = self.projector(self.backbone(torch.cat([x, x.flip(-1)]))).chunk(2)
            loss: Tensor = (p - q).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    task = attach(Own())
    before = decoder_of(task)
    fit(task)
    assert_trained(task, before)


def test_without_a_split_the_first_moco_needs_no_head() -> None:
    task = attach(task_of("MoCoTask version 1"), equivariant_dim=0)
    assert task.recon_aux.splitter.equivariant_dim == 0
    assert "forward" not in vars(task)


WEIGHTS = {"SimCLRTask version 2": 1.0, "MoCoTask version 3": 1.0, "BYOLTask": 0.8}


@pytest.mark.parametrize(("name", "weight"), WEIGHTS.items())
def test_each_task_has_its_default_weight(name: str, weight: float) -> None:
    assert attach(task_of(name)).recon_aux.weight == weight
    assert attach(task_of(name), weight=0.5).recon_aux.weight == 0.5


@pytest.mark.parametrize("name", ["ClassificationTask", "RegressionTask"])
def test_tasks_with_labels_are_refused_by_name(name: str) -> None:
    options: dict[str, Any] = {"num_classes": 2} if name == "ClassificationTask" else {}
    task = task_class(name)("resnet18", **options)
    with pytest.raises(TypeError, match=f"got {type(task).__name__}, which learns from labels"):
        attach(task)


def test_without_torchgeo_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchgeo", None)
    monkeypatch.delitem(sys.modules, "recon_aux.integrations.torchgeo")
    with pytest.raises(ImportError, match=r"pip install '\.\[torchgeo\]'"):
        importlib.import_module("recon_aux.integrations.torchgeo")
