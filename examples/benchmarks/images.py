"""Images in memory, uint8 (N, 3, H, W) with labels (N,), and views of them as encoders see them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kornia
import torch
import torch.nn.functional as F
import torchvision
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import VisionDataset
from torchvision.transforms import v2

from recon_aux.probe import TRANSFORMATIONS, draw_parameters, transform

Split = tuple[Tensor, Tensor]


@torch.no_grad()
def encode(module: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Give what a module makes of images as they are, ``(N, ...)``."""
    parts = [module(as_input(x.to(device))).float().cpu() for x in torch.split(images, 256)]
    return torch.cat(parts)


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
        changes: give what changed, too: ``[x0, x1], (labels, changes)``.
    """

    def __init__(self, *, flip: bool, changes: bool = False) -> None:
        self.flip = flip
        self.changes = changes

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Any]:
        images = torch.stack([image for image, _ in samples]).float() / 255
        labels = torch.stack([label for _, label in samples])
        (x0, first), (x1, second) = (self._view(images) for _ in range(2))
        views = [normalize(x0), normalize(x1)]
        return views, (labels, change_between(first, second)) if self.changes else labels

    def _view(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Give a view of each image, and the parameters that it was made with."""
        flipped = torch.zeros(len(images), dtype=torch.bool)
        if self.flip:
            flipped = torch.rand(len(images)) < 0.5
        drawn = draw_parameters(len(images))
        return transform(mirror(images, flipped), drawn), drawn | {"flipped": flipped}


CHANGE_DIM = 11
"""How many numbers :func:`change_between` gives."""


def change_between(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Compute what changed between two views.

    Args:
        first: parameters of the first view: those of the probe's combined transformation, and
            ``flipped``, whether it was mirrored before.
        second: the same of the second view.

    Returns:
        ``(N, 11)``. The first four are the rotation as an orthogonal 2x2 matrix, with a reflection
        if one view alone is mirrored. Then come the shift, the growth, and the differences of
        brightness, contrast, saturation and hue, all of a standard deviation of about 1.
    """
    start, end = (_geometry(view) for view in (first, second))
    relative = end @ torch.linalg.inv(start)
    linear = relative[:, :2, :2]
    growth = torch.linalg.det(linear).abs().sqrt()
    rotation = linear / growth[:, None, None]
    numbers = {
        "translation_x": relative[:, 0, 2],
        "translation_y": relative[:, 1, 2],
        "scale": growth.log(),
    }
    for name in ("brightness", "contrast", "saturation", "hue"):
        numbers[name] = second[name] - first[name]
    for name, values in numbers.items():
        numbers[name] = values / spread_of_change(name)
    return torch.cat([rotation.flatten(1), torch.stack(list(numbers.values()), dim=1)], dim=1)


def spread_of_change(name: str) -> float:
    """Give the standard deviation of the difference of two draws of a parameter."""
    low, high = TRANSFORMATIONS[name]
    return (high - low) / 6**0.5


def change_back(change: Tensor) -> Tensor:
    """Compute what changed from the second view to the first.

    Args:
        change: from the first view to the second, ``(N, 11)``, as :func:`change_between` gives it.

    Returns:
        The same numbers of the way back.
    """
    rotation = change[:, :4].unflatten(1, (2, 2)).mT
    growth = (change[:, 6] * spread_of_change("scale")).exp()
    shift = -(rotation @ change[:, 4:6, None])[:, :, 0] / growth[:, None]
    return torch.cat([rotation.flatten(1), shift, -change[:, 6:]], dim=1)


def _geometry(view: Mapping[str, Tensor]) -> Tensor:
    """Give the matrices ``(N, 3, 3)`` of views, in fractions of the side, from the middle."""
    count = len(view["rotation"])
    matrix = kornia.geometry.get_affine_matrix2d(
        torch.stack([view["translation_x"], view["translation_y"]], dim=1),
        torch.zeros(count, 2),
        view["scale"][:, None].expand(-1, 2),
        view["rotation"],
    )
    mirrored = torch.where(view["flipped"], -1.0, 1.0)
    return matrix @ torch.diag_embed(torch.stack([mirrored, *torch.ones(2, count)], dim=1))


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """Mirror some images."""
    return torch.where(which[:, None, None, None], images.flip(-1), images)


def normalize(images: Tensor) -> Tensor:
    """From 0..1 to about -2..2, what the encoders see."""
    return (images - 0.5) / 0.25


def as_input(images: Tensor) -> Tensor:
    """From uint8 to what the encoders see."""
    return normalize(images.float() / 255)


def denormalize(views: Tensor) -> Tensor:
    """Undo :func:`normalize`, for a picture: cut to 0..1."""
    return (views * 0.25 + 0.5).clamp(0, 1)
