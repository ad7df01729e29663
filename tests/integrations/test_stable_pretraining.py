"""The stable-pretraining adapter, on the package's own forward functions and classes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import recon_aux
from helpers.weights import assert_trained, decoder_of, weights_of

pytest.importorskip(
    "stable_pretraining",
    reason="stable-pretraining is not installed; `nox -s stable_pretraining` installs it",
)
import lightning
import stable_pretraining as spt
from stable_pretraining import forward, losses, methods
from stable_pretraining.callbacks import factories
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTModel

from recon_aux.integrations.stable_pretraining import attach

WIDTH, SIDE, BATCH, STEPS = 16, 32, 4, 2
FAST = {"optimizer": {"type": "SGD", "lr": 0.05}, "scheduler": {"type": "ConstantLR"}}


@pytest.fixture(scope="module", autouse=True)
def bare_trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Without what the package adds to every trainer: it asks git, pip and the hardware."""
    spt.set(cache_dir=str(tmp_path_factory.mktemp("cache")), verbose="ERROR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factories, "_DEFAULT_CALLBACK_REGISTRY", {})
        yield


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
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        image_size=SIDE,
        patch_size=8,
    )
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
    "simclr": lambda: module("simclr", conv(), projector=mlp(), simclr_loss=losses.NTXEntLoss()),
    "vicreg": lambda: module("vicreg", conv(), projector=mlp(), vicreg_loss=losses.VICRegLoss()),
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
    return call(self, *(view["image"] for view in batch["views"]))


def of_crops(self: Any, batch: Any, stage: str) -> Any:
    views = [view["image"] for view in batch["views"].values()]
    return call(self, views[:2], views[2:])


def of_global_crops(self: Any, batch: Any, stage: str) -> Any:
    return call(self, [view["image"] for view in batch["views"].values()][:2])


def call(self: Any, *views: Any) -> Any:
    """The package's own benchmarks put such a function over the class's forward."""
    output = type(self).forward(self, *views)
    return {"loss": output.loss, "embedding": output.embedding.detach()}


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
    "PMSN": lambda: method(
        "PMSN", of_two_views, encoder_name=vit(), n_prototypes=8, image_size=SIDE, **HEADS
    ),
    "CMAE": lambda: method(
        "CMAE", of_two_views, vit(), patch_size=8, projector_dim=8, image_size=SIDE
    ),
    "DINO": lambda: method("DINO", of_crops, vit(dynamic_img_size=True), 16, 8, 8),
    "DINOv2": lambda: method(
        "DINOv2", of_crops, vit(dynamic_img_size=True), 16, 8, **PROTOTYPES, image_size=SIDE
    ),
    "DINOv3": lambda: method(
        "DINOv3", of_crops, vit(dynamic_img_size=True), 2, image_size=SIDE, **HEADS, **PROTOTYPES
    ),
    "iBOT": lambda: method("iBOT", of_global_crops, vit(), 16, 8, **PROTOTYPES, image_size=SIDE),
    "MIMRefiner": lambda: method(
        "MIMRefiner", of_global_crops, vit(), image_size=SIDE, **HEADS, **PROTOTYPES
    ),
    "LeJEPA": lejepa,
}
CASES = {**FORWARDS, **CLASSES}
QUEUES = {"swav": "swav_queue", "nnclr": "nnclr_support_set"}
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
    """Draw the same masks in each step, however it is come to, and keep the losses."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(trainer.global_step)

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
    its += [spt.callbacks.OnlineQueue(QUEUES[name], 16, 8)] if name in QUEUES else []
    trainer = lightning.Trainer(**{**quiet, **options}, callbacks=its)
    trainer.fit(model, DataLoader(Views(name in MULTI_CROP), BATCH), ckpt_path=ckpt_path)
    return trainer


def made(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name]()


def encoders_of(model: Any) -> list[Any]:
    """The one that is trained, then its teacher, if there is one."""
    backbone = model.encoder if hasattr(model, "encoder") else model.backbone
    parts = [getattr(backbone, part, None) for part in ("student", "teacher")]
    return [part for part in parts if part is not None] or [backbone]


def disturb(model: Any) -> None:
    """Add noise to the equivariant channels of what the encoders return."""
    noise = torch.Generator().manual_seed(0)

    def add(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = torch.randn(output.shape, generator=noise)
        added[..., : WIDTH // 2] = 0
        return output + added

    for encoder in encoders_of(model):
        children = dict(encoder.named_children())
        # a ViT's pooling comes after its norm
        names = [name for name in ("norm", "layernorm", *reversed(children)) if name in children]
        children[names[0]].register_forward_hook(add)


def losses_of(model: Any, name: str) -> list[Tensor]:
    seeded = Seeded()
    fit(model, name, callbacks=[seeded])
    return seeded.losses


def resumed(make: Callable[[], Any], name: str, folder: Path) -> tuple[Any, Any]:
    """A model after two epochs, and one that was resumed after the first."""
    torch.manual_seed(7)
    whole = make()
    fit(whole, name, max_epochs=2)
    torch.manual_seed(7)
    fit(make(), name).save_checkpoint(folder / "last.ckpt")
    torch.manual_seed(8)
    again = make()
    fit(again, name, max_epochs=2, ckpt_path=folder / "last.ckpt")
    return whole, again


def agree(whole: Any, again: Any) -> bool:
    states = whole.state_dict(), again.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# --- every method ---


@pytest.mark.parametrize("name", CASES)
def test_encoder_and_decoder_are_trained(name: str) -> None:
    bare = made(name)
    before = weights_of(encoders_of(bare)[0])
    fit(bare, name)
    model = attach(made(name))
    decoder = decoder_of(model)
    trainer = fit(model, name)
    assert_trained(model, decoder)
    changed = [
        {
            key
            for key, p in encoders_of(one)[0].named_parameters()
            if not torch.equal(p, before[key])
        }
        for one in (bare, model)
    ]
    assert changed[0] <= changed[1]
    assert torch.isfinite(trainer.callback_metrics["recon_aux/loss"])


@pytest.mark.parametrize("name", CASES)
def test_the_methods_loss_sees_no_equivariant_channels(name: str) -> None:
    def losses_with_noise(model: Any) -> list[Tensor]:
        disturb(model)
        return losses_of(model, name)

    def attached() -> Any:
        return attach(made(name), weight=0)

    assert losses_of(made(name), name) != losses_with_noise(made(name))
    assert losses_of(attached(), name) == losses_with_noise(attached())


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_resumes_as_the_bare_run_does(name: str, tmp_path: Path) -> None:
    bare = agree(*resumed(CASES[name], name, tmp_path))
    # the package keeps the queues of these two out of checkpoints
    assert bare == (name not in {"nnclr", "swav"})
    assert agree(*resumed(lambda: attach(CASES[name]()), name, tmp_path)) == bare
