"""The stable-pretraining adapter, on the package's own forward functions and classes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import recon_aux
from helpers.weights import assert_same, assert_trained, decoder_of, weights_of

pytest.importorskip(
    "stable_pretraining",
    reason="stable-pretraining is not installed; `nox -s stable_pretraining` installs it",
)
import lightning
import stable_pretraining as spt
from stable_pretraining import forward, losses, methods
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTModel

from recon_aux.integrations.stable_pretraining import attach

WIDTH, SIDE, BATCH, STEPS = 16, 32, 4, 2
FAST = {"optimizer": {"type": "SGD", "lr": 0.05}, "scheduler": {"type": "ConstantLR"}}

# --- tiny encoders and heads ---


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def vit(**options: Any) -> nn.Module:
    return VisionTransformer(
        SIDE, 8, embed_dim=WIDTH, depth=1, num_heads=2, num_classes=0, **options
    )


def vit_of_transformers() -> nn.Module:
    config = ViTConfig(WIDTH, 1, 2, 2 * WIDTH, image_size=SIDE, patch_size=8)
    return ViTModel(config, add_pooling_layer=False, use_mask_token=True)


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, width))


def both(module: nn.Module) -> nn.Module:
    return spt.TeacherStudentWrapper(module, base_ema_coefficient=0.9)


# --- the forward functions ---


def module(name: str, backbone: nn.Module, **parts: Any) -> Any:
    its = getattr(forward, name)
    return spt.Module(forward=its, backbone=backbone, optim=copy.deepcopy(FAST), **parts)


FORWARDS: dict[str, Callable[[], Any]] = {
    "simclr": lambda: module(
        "simclr", conv(), projector=mlp(), simclr_loss=losses.NTXEntLoss()
    ),
    "vicreg": lambda: module(
        "vicreg", conv(), projector=mlp(), vicreg_loss=losses.VICRegLoss()
    ),
    "barlow_twins": lambda: module(
        "barlow_twins", conv(), projector=mlp(), barlow_loss=losses.BarlowTwinsLoss()
    ),
    "byol": lambda: module(
        "byol",
        both(conv()),
        projector=both(mlp()),
        predictor=nn.Linear(8, 8),
        byol_loss=losses.BYOLLoss(),
    ),
    "swav": lambda: module(
        "swav",
        conv(),
        projector=mlp(),
        prototypes=nn.Linear(8, 6, bias=False),
        swav_loss=losses.SwAVLoss(),
        use_queue=True,
        queue_length=8,
        projection_dim=8,
        start_queue_at_epoch=0,
    ),
    "nnclr": lambda: module(
        "nnclr",
        conv(),
        projector=mlp(),
        predictor=nn.Linear(8, 8),
        nnclr_loss=losses.NTXEntLoss(),
        hparams={"support_set_size": 16, "projection_dim": 8},
    ),
    "dino": lambda: module(
        "dino",
        both(vit_of_transformers()),
        projector=both(mlp()),
        dino_loss=losses.DINOv1Loss(),
    ),
    "dinov2": lambda: module(
        "dinov2",
        both(vit_of_transformers()),
        projector=both(mlp()),
        patch_projector=both(mlp()),
        dinov2_loss=losses.DINOv2Loss(),
    ),
}

# --- the classes ---


def of_two_views(self: Any, batch: Any, stage: str) -> Any:
    if "views" not in batch and "image" in batch:
        return {"embedding": type(self).forward(self, batch["image"]).embedding}
    return dict(type(self).forward(self, *(view["image"] for view in views_in(batch))))


def of_crops(self: Any, batch: Any, stage: str) -> Any:
    crops = {
        size: [view["image"] for name, view in batch["views"].items() if name.startswith(size)]
        for size in ("global", "local")
    }
    # iBOT takes no local ones
    if "ibot" in type(self).__module__ or "mim" in type(self).__module__:
        return dict(type(self).forward(self, crops["global"]))
    return dict(type(self).forward(self, crops["global"], crops["local"]))


def views_in(batch: Any) -> list[Any]:
    views = batch["views"]
    return list(views.values())[:2] if isinstance(views, dict) else views[:2]


def method(name: str, through: Any, *given: Any, **options: Any) -> Any:
    model = getattr(methods, name)(*given, **options)
    model.forward = through.__get__(model)
    model.optim = copy.deepcopy(FAST)
    return model


def lejepa() -> Any:
    model = method("LeJEPA", of_crops, "test_vit", projector=mlp(), n_slices=8)
    model.backbone = vit(dynamic_img_size=True)
    return model


HEADS = {"projector_hidden_dim": 16, "projector_bottleneck_dim": 8}
PROTOTYPES = {"n_cls_prototypes": 8, "n_patch_prototypes": 8}
CLASSES: dict[str, Callable[[], Any]] = {
    "SimCLR": lambda: method("SimCLR", of_two_views, conv(), (16, 8)),
    "VICReg": lambda: method("VICReg", of_two_views, conv(), (16, 8)),
    "BarlowTwins": lambda: method("BarlowTwins", of_two_views, conv(), (16, 8)),
    "BYOL": lambda: method("BYOL", of_two_views, conv(), (16, 8), (16, 8)),
    "SimSiam": lambda: method("SimSiam", of_two_views, conv(), 16, 8),
    "MoCov2": lambda: method("MoCov2", of_two_views, conv(), (16, 8), 16),
    "MoCov3": lambda: method("MoCov3", of_two_views, conv(), (16, 16, 8), 8),
    "NNCLR": lambda: method("NNCLR", of_two_views, conv(), (16, 8), 8, 16),
    "TiCO": lambda: method("TiCO", of_two_views, conv(), (16, 8)),
    "WMSE": lambda: method("WMSE", of_two_views, conv(), (16, 4)),
    "PIRL": lambda: method("PIRL", of_two_views, conv(), 8, 16),
    "SwAV": lambda: method("SwAV", of_two_views, conv(), (16, 8), 6),
    "VICRegL": lambda: method("VICRegL", of_two_views, vit(), 16, image_size=SIDE),
    "MSN": lambda: method("MSN", of_two_views, vit(), 16, 8, 8, image_size=SIDE),
    "PMSN": lambda: method("PMSN", of_two_views, vit(), 16, 8, 8, image_size=SIDE),
    "CMAE": lambda: method(
        "CMAE", of_two_views, vit(), patch_size=8, projector_dim=8, image_size=SIDE
    ),
    "DINO": lambda: method(
        "DINO", of_crops, vit(dynamic_img_size=True), 16, 8, 8
    ),
    "DINOv2": lambda: method(
        "DINOv2", of_crops, vit(dynamic_img_size=True), 16, 8, **PROTOTYPES, image_size=SIDE
    ),
    "DINOv3": lambda: method(
        "DINOv3", of_crops, vit(dynamic_img_size=True), 2, image_size=SIDE, **HEADS, **PROTOTYPES
    ),
    "iBOT": lambda: method(
        "iBOT", of_crops, vit(), 16, 8, **PROTOTYPES, image_size=SIDE
    ),
    "MIMRefiner": lambda: method("MIMRefiner", of_crops, vit(), image_size=SIDE, **HEADS, **PROTOTYPES),
    "LeJEPA": lejepa,
}
CASES = {**FORWARDS, **CLASSES}
MULTI_CROP = {"dino", "dinov2", "DINO", "DINOv2", "DINOv3", "iBOT", "MIMRefiner", "LeJEPA"}


# --- data and training ---


class Views(Dataset[Any]):
    """The same views for each index."""

    def __init__(self, crops: bool, size: int = BATCH * STEPS) -> None:
        self.crops, self.size = crops, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        coarse = torch.rand(3, 4, 4, generator=generator)
        noisy = [coarse + 0.3 * torch.rand(3, 4, 4, generator=generator) for _ in range(3)]
        whole = [nn.functional.interpolate(x[None], SIDE, mode="bilinear")[0] for x in noisy]
        views = [{"image": x, "label": torch.tensor(index % 2)} for x in whole]
        if not self.crops:
            return {"views": views[:2]}
        views[2]["image"] = views[2]["image"][:, :16, :16]
        return {"views": dict(zip(["global_1", "global_2", "local_1"], views, strict=True))}


class Seeded(lightning.Callback):
    """Draw the same masks in each epoch, however it is come to, and keep the losses."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())


def fit(
    model: Any, name: str, *, ckpt_path: Path | None = None, callbacks: Any = (), **options: Any
) -> Any:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    its = [Seeded(), spt.callbacks.TeacherStudentCallback(), *callbacks]
    trainer = lightning.Trainer(**{**quiet, **options}, callbacks=its)
    trainer.fit(model, DataLoader(Views(name in MULTI_CROP), BATCH), ckpt_path=ckpt_path)
    return trainer


def made(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name]()


def encoder_of(model: Any) -> Any:
    backbone = model.encoder if hasattr(model, "encoder") else model.backbone
    return getattr(backbone, "student", backbone)


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    now = weights_of(model)
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


@pytest.mark.parametrize("name", CASES)
def test_encoder_and_decoder_are_trained(name: str) -> None:
    bare = made(name)
    before = weights_of(bare)
    fit(bare, name)
    model = attach(made(name))
    decoder = decoder_of(model)
    trainer = fit(model, name)
    assert_trained(model, decoder)
    assert changed(bare, before) == changed(model, before)
    assert torch.isfinite(trainer.callback_metrics["recon_aux/loss"])
