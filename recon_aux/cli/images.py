"""Read the images that the probe looks at: digits, CIFAR-10, or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms import Normalize

from recon_aux.cli.errors import UserError
from recon_aux.probe.inputs import with_eight_bits

# an image is a file or a picture; its class is a number, or None if there are no classes
Sample = tuple[Path | Image.Image, int | None]

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
_TRAIN = ("train", "training")
_HELD_OUT = ("test", "testing", "val", "valid", "validation", "dev", "eval")
_FORMS = "a folder of images, of class folders, or of train/ and test/ (or val/) with class folders"


def parse_normalization(text: str) -> Normalize:
    """Read ``imagenet``, ``none``, or mean and deviation of pixels from 0 to 1.

    Two numbers are of all channels, six of each: three means, then three deviations.

    Raises:
        UserError: if it is something else.

    Example:
        >>> parse_normalization("0.5,0.25")(torch.ones(1, 3, 1, 1)).flatten()
        tensor([2., 2., 2.])
    """
    text = {"imagenet": "0.485,0.456,0.406,0.229,0.224,0.225", "none": "0,1"}.get(text, text)
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    mean, std = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    is_known = len(numbers) in (2, 6) and all(0 <= x <= 1 for x in numbers)
    if not is_known or min(std) == 0:
        raise UserError(
            "expected --normalize as imagenet, none or MEAN,STD of pixels from 0 to 1, got "
            f"{text!r}. Pass one of these, as --normalize 0.5,0.25, or three means and three "
            "deviations, as --normalize 0.49,0.48,0.45,0.25,0.24,0.26."
        )
    each = 3 // len(mean)
    return Normalize(mean * each, std * each)


@dataclass
class Images:
    """Images and labels for the probe, and in words where they come from.

    Attributes:
        train: uint8 ``(N, 3, H, W)``, and labels ``(N,)`` or None.
        test: the same, of held-out images.
        description: what was held out.
    """

    train: tuple[Tensor, Tensor | None]
    test: tuple[Tensor, Tensor | None]
    description: str

    @property
    def size(self) -> int:
        """Give the side of the images."""
        return self.train[0].shape[-1]

    def __str__(self) -> str:
        counts = f"{len(self.train[0])} images to train on, {len(self.test[0])} to test on"
        return f"{self.description}. {counts}, of {self.size}x{self.size} pixels"


def load_images(data: str, size: int | None, limit: int) -> Images:
    """Load images that are held in memory.

    Args:
        data: ``digits``, ``cifar10``, or a folder.
        size: side of the images; by default 32, and for a folder the short side of its first image,
            but 224 at most.
        limit: how many images to train on, at most; half as many are tested on. They are drawn at
            random, but always the same.

    Raises:
        UserError: if there are no such images.
    """
    if data == "digits":
        train, test = digits(size or 32)
        description = "scikit-learn's digits in colour; 397 of the 1797 are held out"
        return Images(_first(train, limit), _first(test, limit // 2), description)
    if data == "cifar10":
        return _read(*_cifar10(), size or 32, limit, "CIFAR-10; its test split is held out")
    samples, held_out, description = _folder(Path(data))
    return _read(samples, held_out, size or _natural_size(samples[0][0]), limit, description)


def digits(size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load scikit-learn's digits, 1400 to train on and 397 to test on, in orange on blue.

    Example:
        >>> (images, labels), (held_out, _) = digits(16)
        >>> images.shape, held_out.shape
        (torch.Size([1400, 3, 16, 16]), torch.Size([397, 3, 16, 16]))
    """
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    margin = min(4, size // 4)
    ink = pixels.float().view(-1, 1, 8, 8) / 16
    ink = F.pad(F.interpolate(ink, size - 2 * margin, mode="bilinear"), [margin] * 4)
    images = torch.cat([0.2 + 0.7 * ink, 0.3 + 0.3 * ink, 0.5 - 0.2 * ink], dim=1)
    images = (images * 255).byte()
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = ((images[some], labels[some]) for some in (rows[:1400], rows[1400:]))
    return train, test


def _first(split: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    return split[0][:count], split[1][:count]


def _cifar10() -> tuple[CIFAR10, CIFAR10]:
    try:
        train, test = (CIFAR10("datasets", train=split, download=True) for split in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"expected to download CIFAR-10 into datasets/ ({error}). Pass --data with a folder of "
            "images, or digits."
        ) from error
    return train, test


def _folder(root: Path) -> tuple[list[Sample], list[Sample], str]:
    if not root.is_dir():
        raise UserError(
            f"expected --data as digits, cifar10 or {_FORMS}, got {root}, which is no folder. Pass "
            "one of these."
        )
    train, held_out = _splits(root)
    if train is not None and held_out:
        known = _classes(train)
        # test/ or val/ may have no class folders: prefer the one that has
        test = next((x for x in held_out if known and _samples(x, known)), held_out[0])
        splits = [_samples(train, known), _samples(test, known)]
        description = f"{root}; {test.name}/ is held out"
    else:
        # a class may be called train, too: then it has no class folders
        root = train if train is not None and _classes(train) else root
        classes = _classes(root)
        _refuse_splits(root, classes)
        samples = _samples(root, classes)
        # every fifth of shuffled images
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        splits = [
            [samples[row] for i, row in enumerate(order) if bool(i % 5) is kept]
            for kept in (True, False)
        ]
        description = f"{root}; a fifth of its {len(samples)} images, drawn at random, is held out"
    if not any(splits):
        raise UserError(
            f"expected {_FORMS}, got {root} without images. Pass a folder with files that end in "
            f"{', '.join(sorted(_ENDINGS))}."
        )
    if min(map(len, splits)) < 2:
        raise UserError(
            f"expected {_FORMS}, got {root} with {len(splits[0])} images to train on and "
            f"{len(splits[1])} to test on. Pass a folder with two of each, or more."
        )
    if splits[0][0][1] is None:
        description += "; there are no class folders, so no accuracies"
    return splits[0], splits[1], description


def _splits(root: Path) -> tuple[Path | None, list[Path]]:
    """Find the folder to train on, if there is one, and those that may be held out."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = next((folders[name] for name in _TRAIN if name in folders), None)
    return train, [folders[name] for name in _HELD_OUT if name in folders]


def _refuse_splits(root: Path, classes: list[str]) -> None:
    """Refuse class folders that share a subfolder's name: they are splits, not classes."""
    within = [set(_classes(root / name)) for name in classes]
    if shared := set[str]().union(*within).intersection(*within):
        raise UserError(
            f"expected {_FORMS}, got {root} with {', '.join(classes[:4])}, which have the same "
            f"folders, as {min(shared)}. If they are splits, rename them to train and test."
        )


def _classes(folder: Path) -> list[str]:
    """Give the names of the class folders, if there are two or more."""
    folders = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    names = sorted(path.name for path in folders if _files(path))
    return names if len(names) > 1 else []


def _samples(folder: Path, classes: list[str]) -> list[Sample]:
    if not classes:
        return [(path, None) for path in _files(folder)]
    return [(path, label) for label, name in enumerate(classes) for path in _files(folder / name)]


def _files(folder: Path) -> list[Path]:
    """Find the images in a folder, but none that is hidden or in a hidden folder."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _ENDINGS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _natural_size(path: Path | Image.Image) -> int:
    return min(224, *_open(path).size)


def _open(image: Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        opened: Image.Image = with_eight_bits(Image.open(image))
        return opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(
            f"expected an image, got {image}, which can't be read. Remove it."
        ) from error
    except ValueError as error:
        raise UserError(f"{image}: {error}") from error


def _read(train: Any, test: Any, size: int, limit: int, description: str) -> Images:
    splits = []
    for samples, count in ((train, limit), (test, limit // 2)):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
        some = [samples[row] for row in order[:count].tolist()]
        images = [_tensor(image, size) for image, _ in track(some, "reading", transient=True)]
        labels = [label for _, label in some if label is not None]
        splits.append((torch.stack(images), torch.tensor(labels) if labels else None))
    return Images(splits[0], splits[1], description)


def _tensor(source: Path | Image.Image, size: int) -> Tensor:
    """Scale an image to cover the square, and cut out its middle."""
    fitted = ImageOps.fit(_open(source), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
