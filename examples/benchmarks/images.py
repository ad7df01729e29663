"""Images in memory, uint8 (N, 3, H, W) with labels (N,), and views of them as encoders see them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import VisionDataset
from torchvision.transforms import v2

from recon_aux.probe import draw_parameters, transform

Split = tuple[Tensor, Tensor]


def load(data: str, image_size: int, limit: int | None = None) -> tuple[Split, Split]:
    """Load the train split and the test split of digits, cifar10, or a folder."""
    if data == "digits":
        train, test = _digits(image_size)
        train = (train[0][:limit], train[1][:limit])
    elif data == "cifar10":
        cifar = (torchvision.datasets.CIFAR10("datasets", s, download=True) for s in (True, False))
        train, test = _stack(*cifar, image_size=image_size, limit=limit)
    else:
        train, test = _folder(Path(data), image_size, limit)
    return train, test


def _digits(image_size: int) -> tuple[Split, Split]:
    """scikit-learn's handwritten digits in orange ink on blue paper.

    All have the same colours: SimCLR would recognise an image by a colour of its own.
    """
    digits = load_digits()
    strokes = torch.from_numpy(digits.images).float()[:, None] / 16
    strokes = F.interpolate(strokes, image_size - 8, mode="bilinear")
    strokes = F.pad(strokes, (4, 4, 4, 4))
    ink = torch.tensor([0.9, 0.6, 0.3])[:, None, None]
    paper = torch.tensor([0.2, 0.3, 0.5])[:, None, None]
    images = (strokes * ink + (1 - strokes) * paper) * 255
    labels = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(images), generator=generator)
    train, test = ((images[r].to(torch.uint8), labels[r]) for r in (rows[:1400], rows[1400:]))
    return train, test


def _folder(root: Path, image_size: int, limit: int | None) -> tuple[Split, Split]:
    expected = (
        f"--data expects digits, cifar10, or a folder with train/ and test/ (or val/), {root}"
    )
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
    return _stack(train, test, image_size=image_size, limit=limit)


def _stack(
    train: VisionDataset, test: VisionDataset, *, image_size: int, limit: int | None
) -> tuple[Split, Split]:
    """Read images into memory, of the train split ``limit`` at random."""
    prepare = v2.Compose(
        [
            v2.RGB(),
            v2.Resize(image_size),
            v2.CenterCrop(image_size),
            v2.PILToTensor(),
        ]
    )
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    splits = []
    for name, dataset, rows in (
        ("train", train, shuffled[:limit]),
        ("test", test, range(len(test))),
    ):
        images, labels = [], []
        for row in track(rows, f"reading {name} images"):
            image, label = dataset[row]
            images.append(prepare(image))
            labels.append(label)
        splits.append((torch.stack(images), torch.tensor(labels)))
    return splits[0], splits[1]


class TwoViews:
    """Collate images into two views of each, transformed at random: ``[x0, x1], labels``.

    Args:
        flip: mirror each view at random, too.
    """

    def __init__(self, *, flip: bool) -> None:
        self.flip = flip

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        images = torch.stack([image for image, _ in samples]).float() / 255
        labels = torch.stack([label for _, label in samples])
        return [normalize(self._view(images)) for _ in range(2)], labels

    def _view(self, images: Tensor) -> Tensor:
        if self.flip:
            images = flip_half(images)
        return transform(images, draw_parameters(len(images)))


def flip_half(images: Tensor) -> Tensor:
    """Mirror each image, or leave it, at random."""
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)


def normalize(images: Tensor) -> Tensor:
    """From 0..1 to about -2..2, what the encoders see."""
    return (images - 0.5) / 0.25


def as_input(images: Tensor) -> Tensor:
    """From uint8 to what the encoders see."""
    return normalize(images.float() / 255)


def denormalize(views: Tensor) -> Tensor:
    """Undo :func:`normalize`, for a picture: cut to 0..1."""
    return (views * 0.25 + 0.5).clamp(0, 1)
