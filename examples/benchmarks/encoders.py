"""The encoders that the studies train, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock


def small_resnet18(width: int = 64, stride: int = 1) -> nn.Module:
    """Build torchvision's ResNet-18 with a 3x3 stem and no pooling after it: ``(B, 8 * width)``."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    channels = width
    for stage in range(4):
        out = width * 2**stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            downsample = None
            if stride != 1:
                downsample = nn.Sequential(
                    nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                )
            layers.append(BasicBlock(channels, out, stride, downsample))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def vit(image_size: int, patch_size: int, layers: int, width: int) -> nn.Module:
    """Build torchvision's vision transformer, with heads of 64 channels: ``(B, width)``."""
    sizes = {"num_heads": width // 64, "hidden_dim": width, "mlp_dim": 4 * width}
    model: nn.Module = torchvision.models.VisionTransformer(image_size, patch_size, layers, **sizes)
    model.heads = nn.Identity()
    return model


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "tiny-resnet18": lambda: small_resnet18(width=32, stride=2),
    "small-resnet18": small_resnet18,
    "tiny-vit": lambda: vit(32, 4, layers=6, width=192),
    "vit-small": lambda: vit(224, 16, layers=12, width=384),
}


def build_encoder(name: str) -> nn.Module:
    """Build one of ``ENCODERS``, or any torchvision classifier without its last layer."""
    if name in ENCODERS:
        return ENCODERS[name]()
    if name not in torchvision.models.list_models(torchvision.models):
        raise SystemExit(f"--backbone expects {list(ENCODERS)} or torchvision's name, got {name!r}")
    encoder: nn.Module = torchvision.models.get_model(name)
    for last in ("fc", "classifier", "heads", "head"):
        if hasattr(encoder, last):
            setattr(encoder, last, nn.Identity())
    return encoder


def width_of(encoder: nn.Module, image_size: int) -> int:
    """Find the width of an encoder's features."""
    with torch.random.fork_rng(), torch.no_grad():
        blank = torch.zeros(1, 3, image_size, image_size)
        width = encoder.eval()(blank).flatten(1).shape[1]
    encoder.train()
    return int(width)
