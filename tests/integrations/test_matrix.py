"""Encoders of timm, torchvision and transformers, and TorchGeo's tasks: each trains, or is refused.

A refusal is followed: what it advises has to train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import convnext_tiny, resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import VisionTransformer

import recon_aux
from helpers.geo import augmentation, task_class
from helpers.training import take_steps
from helpers.watching import rebuilt_from
from helpers.weights import assert_both_trained, weights_of
from recon_aux.integrations import lightly

SIDE = 32


class SimCLR(nn.Module):
    """Calls the encoder as ``encode`` does."""

    recon_aux: Any

    def __init__(self, backbone: nn.Module, width: int, encode: Callable[..., Tensor]) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.projection_head = SimCLRProjectionHead(width, 32, 16)
        self.criterion = NTXentLoss()
        self.encode = encode

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(*(self.projection_head(self.encode(self.backbone, x)) for x in batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def views(channels: int = 3) -> Tensor:
    return torch.rand(4, channels, SIDE, SIDE) + 0.05 * torch.rand(2, 4, channels, SIDE, SIDE)


def trains(model: Any, batch: Any, width: int) -> None:
    """Two steps change the encoder and the decoder, and rebuild features of this width."""
    seen = rebuilt_from(model)
    before = weights_of(model)
    take_steps(model, model.configure_optimizers(), [batch, batch])
    assert_both_trained(model, before)
    assert model.recon_aux.splitter.feature_dim == width
    assert all(torch.isfinite(y).all() for y in seen[-1][1])


def mean(feature: Tensor) -> Tensor:
    """Over positions, wherever they are."""
    return feature.mean(1) if feature.ndim == 3 else feature.mean((2, 3))


# --- timm ---

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {
        "img_size": SIDE,
        "embed_dim": 24,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "window_size": 4,
    },
}


def of_timm(name: str) -> Any:
    return timm.create_model(name, num_classes=0, **SMALL[name])


@pytest.mark.parametrize("name", SMALL)
def test_timms_encoders_by_forward(name: str) -> None:
    encoder = of_timm(name)
    width = encoder.num_features
    model = SimCLR(encoder, width, lambda backbone, x: backbone(x))
    trains(lightly.attach(model), views(), width)


@pytest.mark.parametrize("name", SMALL)
def test_timms_encoders_by_forward_features(name: str) -> None:
    def encode(backbone: Any, x: Tensor) -> Tensor:
        y = backbone.forward_features(x)
        return y.mean((1, 2)) if name.startswith("swin") else mean(y)

    encoder = of_timm(name)
    width = encoder.num_features
    with pytest.raises(RuntimeError, match=r"backbone_method= if another of its methods is called"):
        lightly.attach(SimCLR(encoder, width, encode)).training_step(views(), 0)
    model = SimCLR(of_timm(name), width, encode)
    trains(lightly.attach(model, backbone_method="forward_features"), views(), width)


def test_a_norm_between_encoder_and_head_becomes_a_part_of_one() -> None:
    def encode(backbone: Any, x: Tensor) -> Tensor:
        return backbone.forward_head(backbone.forward_features(x), pre_logits=True)

    encoder = of_timm("convnext_atto")
    width = encoder.num_features
    model = lightly.attach(SimCLR(encoder, width, encode), backbone_method="forward_features")
    with pytest.raises(RuntimeError, match="make it a part of the head, or of the encoder"):
        model.training_step(views(), 0)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = of_timm("convnext_atto")

        def forward(self, x: Tensor) -> Tensor:
            return encode(self.inner, x)

    model = SimCLR(Whole(), width, lambda backbone, x: backbone(x))
    trains(lightly.attach(model), views(), width)


# --- torchvision ---


def test_torchvisions_encoders() -> None:
    resnet: Any = resnet18()
    resnet.fc = nn.Identity()
    convnext: Any = convnext_tiny()
    vit: Any = VisionTransformer(SIDE, 8, 2, 2, 32, 64)
    vit.heads = nn.Identity()
    for encoder, width in ((resnet, 512), (vit, 32)):
        trains(lightly.attach(SimCLR(encoder, width, lambda f, x: f(x))), views(), width)
    model = SimCLR(convnext.features[:2], 96, lambda f, x: mean(f(x)))
    trains(lightly.attach(model), views(), 96)


def test_fx_extractors() -> None:
    def model() -> SimCLR:
        extractor = create_feature_extractor(resnet18(), {"flatten": "f"})
        return SimCLR(extractor, 512, lambda f, x: f(x)["f"])

    with pytest.raises(TypeError, match=r"Pass features=lambda output: \.\.\."):
        lightly.attach(model())
    trains(lightly.attach(model(), features=lambda output: output["f"]), views(), 512)


# --- transformers ---


def of_transformers(kind: str) -> Any:
    tokens: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens |= {"intermediate_size": 32, "image_size": SIDE, "patch_size": 8}
    maps: Any = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    swin: Any = {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1]}
    config: Any = {
        "ViT": lambda: transformers.ViTConfig(**tokens),
        "Dinov2": lambda: transformers.Dinov2Config(**tokens, mlp_ratio=2),
        "CLIPVision": lambda: transformers.CLIPVisionConfig(**tokens),
        "ConvNext": lambda: transformers.ConvNextConfig(**maps),
        "ResNet": lambda: transformers.ResNetConfig(embedding_size=8, layer_type="basic", **maps),
        "Swin": lambda: transformers.SwinConfig(**swin, num_heads=[1, 2, 2], window_size=4),
    }[kind]()
    return transformers.AutoModel.from_config(config)


KINDS = ["ViT", "Dinov2", "CLIPVision", "ConvNext", "ResNet", "Swin"]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_models_by_what_their_head_receives(kind: str) -> None:
    def of_states(backbone: Any, x: Tensor) -> Tensor:
        return mean(backbone(pixel_values=x).last_hidden_state)

    with pytest.raises(TypeError, match=r"Pass features=lambda output: \.\.\."):
        lightly.attach(SimCLR(of_transformers(kind), 32, of_states))
    model = SimCLR(of_transformers(kind), 32, of_states)
    trains(lightly.attach(model, features=lambda out: out.last_hidden_state), views(), 32)

    def of_pooler(backbone: Any, x: Tensor) -> Tensor:
        return backbone(pixel_values=x).pooler_output.flatten(1)

    model = SimCLR(of_transformers(kind), 32, of_pooler)
    trains(lightly.attach(model, features=lambda out: out.pooler_output), views(), 32)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "CLIPVision"])
def test_a_transformers_first_token(kind: str) -> None:
    model = SimCLR(of_transformers(kind), 32, lambda f, x: f(x).last_hidden_state[:, 0])
    trains(lightly.attach(model, features=lambda out: out.last_hidden_state[:, 0]), views(), 32)


def test_a_transformer_whose_hidden_states_are_asked_for() -> None:
    def encode(backbone: Any, x: Tensor) -> Tensor:
        return mean(backbone(pixel_values=x, output_hidden_states=True).hidden_states[-1])

    def last(out: Any) -> Tensor:
        return out.hidden_states[-1]

    with pytest.raises(TypeError, match="pass example_input="):
        lightly.attach(SimCLR(of_transformers("ViT"), 32, encode), features=last)
    model = SimCLR(of_transformers("ViT"), 32, encode)
    example = {"pixel_values": torch.rand(1, 3, SIDE, SIDE), "output_hidden_states": True}
    trains(lightly.attach(model, features=last, example_input=example), views(), 32)


def test_another_feature_than_the_heads_receive_is_refused() -> None:
    def model() -> SimCLR:
        return SimCLR(of_transformers("ViT"), 32, lambda f, x: f(x).pooler_output)

    attached = lightly.attach(model(), features=lambda out: out.last_hidden_state)
    with pytest.raises(RuntimeError, match="pass features=lambda output: what they receive"):
        attached.training_step(views(), 0)
    trains(lightly.attach(model(), features=lambda out: out.pooler_output), views(), 32)


# --- TorchGeo ---

BANDS = 13
SMALL_HEADS: dict[str, Any] = {"hidden_dim": 64, "memory_bank_size": 64}


def of_torchgeo(name: str, **options: Any) -> Any:
    return task_class(name)(model="resnet18", in_channels=BANDS, **options)


def trains_by_lightning(task: Any, width: int = 512) -> None:
    """Two steps by Lightning's trainer, of images as TorchGeo's data sets give them."""
    seen = rebuilt_from(task)
    before = weights_of(task)
    scenes = [{"image": torch.rand(BANDS, SIDE, SIDE)} for _ in range(8)]
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    trainer.fit(task, DataLoader(scenes, 4))  # type: ignore[arg-type]
    assert_both_trained(task, before)
    assert task.recon_aux.splitter.feature_dim == width
    assert len(seen) == 2


@pytest.mark.slow
def test_torchgeos_simclr() -> None:
    for version in (1, 2):
        task = of_torchgeo("SimCLRTask", version=version, size=SIDE)
        trains_by_lightning(lightly.attach(task))


@pytest.mark.slow
def test_torchgeos_moco() -> None:
    def task(version: int) -> Any:
        # the memory bank of version 1 keeps the encoder's features
        small = {**SMALL_HEADS, "output_dim": 512 if version == 1 else 32}
        return of_torchgeo("MoCoTask", version=version, size=SIDE, **small)

    with pytest.raises(ValueError, match="If it has none, pass equivariant_dim=0"):
        lightly.attach(task(1))
    with pytest.raises(RuntimeError, match="pass views=1"):
        trains_by_lightning(lightly.attach(task(1), equivariant_dim=0))
    trains_by_lightning(lightly.attach(task(1), equivariant_dim=0, views=1))
    with pytest.raises(RuntimeError, match="pass views=1"):
        trains_by_lightning(lightly.attach(task(2)))
    trains_by_lightning(lightly.attach(task(2), views=1))
    trains_by_lightning(lightly.attach(task(3)))


@pytest.mark.slow
def test_torchgeos_byol_runs_its_heads_by_hooks() -> None:
    def task() -> Any:
        made = of_torchgeo("BYOLTask")
        made.model.augment = augmentation(SIDE)
        return made

    heads = ["model.backbone._projector", "model.target._projector"]
    given: Any = {"backbone": "model.backbone.model", "heads": heads}
    with pytest.raises(ValueError, match=r"Pass backbone=: one of model \(BYOL"):
        lightly.attach(task())
    model = task()
    wrapper = model.model.backbone
    # since 0.10 the encoder has no classifier after the feature
    if not isinstance([*wrapper.model.children()][-1], nn.Identity):
        with pytest.raises(ValueError, match="than the encoder returns, pass features="):
            trains_by_lightning(recon_aux.attach(task(), **given))
        given["features"] = lambda output: wrapper._embedding
    recon_aux.attach(model, **given)
    trains_by_lightning(model)
