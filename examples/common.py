"""What the examples share: options, data, views, backbones, and the side-by-side report."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

from recon_aux.probe import ProbeResult, draw_parameters, probe, render, transform

Split = tuple[Tensor, Tensor]


# --- data: uint8 images (N, 3, H, W) and labels (N,), in memory ---


def load(data: str, image_size: int, limit: int | None = None) -> tuple[Split, Split, int]:
    """Load the train split, the test split and the number of classes."""
    if data == "digits":
        train, test = _digits(image_size)
    elif data == "cifar10":
        splits = [torchvision.datasets.CIFAR10("datasets", s, download=True) for s in (True, False)]
        train, test = (_stack(split, image_size, "CIFAR-10") for split in splits)
    else:
        train, test = _folder(Path(data), image_size)
    classes = int(train[1].max()) + 1
    if limit:
        rows = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[:limit]
        train = (train[0][rows], train[1][rows])
    return train, test, classes


def _digits(image_size: int) -> tuple[Split, Split]:
    """scikit-learn's handwritten digits, each in an ink and on a paper of its own colour."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    strokes = torch.from_numpy(digits.images).float()[:, None] / 16
    strokes = nn.functional.interpolate(strokes, image_size - 8, mode="bilinear")
    strokes = nn.functional.pad(strokes, (4, 4, 4, 4))
    generator = torch.Generator().manual_seed(0)
    paper, ink = torch.rand(2, len(strokes), 3, 1, 1, generator=generator)
    images = (strokes * (0.4 + 0.6 * ink) + (1 - strokes) * 0.5 * paper) * 255
    labels = torch.from_numpy(digits.target)
    rows = torch.randperm(len(images), generator=generator).split([1400, len(images) - 1400])
    train, test = ((images[r].to(torch.uint8), labels[r]) for r in rows)
    return train, test


def _folder(root: Path, image_size: int) -> tuple[Split, Split]:
    expected = f"--data expects digits, cifar10, or a folder with train/ and test/ (or val/), {root}"
    if not root.is_dir():
        raise SystemExit(f"{expected} is not a folder")
    splits = [root / "train", root / "test" if (root / "test").is_dir() else root / "val"]
    for split in splits:
        if not split.is_dir():
            raise SystemExit(f"{expected} has no {split.name}/")
        classes = [folder for folder in split.iterdir() if folder.is_dir()]
        if len(classes) < 2:
            raise SystemExit(
                f"expected two or more class folders of images in {split}, found {len(classes)}"
            )
    try:
        datasets = [torchvision.datasets.ImageFolder(str(split)) for split in splits]
    except FileNotFoundError as error:
        raise SystemExit(f"expected images in every class folder of {root}: {error}") from error
    train, test = datasets
    if train.classes != test.classes:
        raise SystemExit(f"expected the same class folders in {splits[0]} and in {splits[1]}")
    return _stack(train, image_size, "train images"), _stack(test, image_size, "test images")


def _stack(dataset: torchvision.datasets.VisionDataset, image_size: int, name: str) -> Split:
    prepare = v2.Compose(
        [
            v2.RGB(),
            v2.Resize(image_size),
            v2.CenterCrop(image_size),
            v2.PILToTensor(),
        ]
    )
    images, labels = [], []
    for index in track(range(len(dataset)), f"reading {name}"):
        image, label = dataset[index]
        images.append(prepare(image))
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


class TwoViews:
    """Collate images into two augmented views of each: ``[x0, x1], labels``, lightly's layout."""

    def __init__(self, *, flip: bool) -> None:
        self.flip = flip

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        images = torch.stack([image for image, _ in samples]).float() / 255
        labels = torch.stack([label for _, label in samples])
        return [normalize(self._view(images)) for _ in range(2)], labels

    def _view(self, images: Tensor) -> Tensor:
        if self.flip:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        return transform(images, draw_parameters(len(images)))


def normalize(images: Tensor) -> Tensor:
    """From 0..1 to about -2..2, what the encoders see."""
    return (images - 0.5) / 0.25


# --- encoders ---


def small_resnet18(width: int = 64, stride: int = 1) -> nn.Module:
    """Build torchvision's ResNet-18 with a stem for small images, any width: ``(B, 8 * width)``."""
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
