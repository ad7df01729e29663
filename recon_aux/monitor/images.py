"""Take a fixed number of clean images, with labels if there are some, from what the user has."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

_LABELS = ("label", "labels", "target", "targets", "y")
FEWEST = 16


def take_images(source: Any, labels: Any, count: int) -> tuple[Tensor, Tensor | None]:
    """Take images and labels out of a tensor, a dataset or a loader.

    Args:
        source: images ``(N, C, H, W)``; or a dataset or an iterable of images, or of tuples or
            dicts that hold an image and a label; or a loader of batches of them.
        labels: ``(N,)``, of the images of a tensor or of a dataset.
        count: how many images, at most. Where there are more, they are evenly spaced over a
            dataset, and over that of a plain loader. Of others they are the first.

    Returns:
        Images, uint8 or floats from 0 to 1, and labels, if there are some.

    Raises:
        TypeError: if there is no image in what the source gives.
        ValueError: if there are too few, or of several sizes, or not from 0 to 1, or labels don't
            fit them.

    Example:
        >>> dataset = [(torch.zeros(3, 8, 8), i % 2) for i in range(50)]
        >>> images, labels = take_images(dataset, None, 20)
        >>> images.shape, labels.shape
        (torch.Size([20, 3, 8, 8]), torch.Size([20]))
    """
    from recon_aux.probe.inputs import check_images, stacked  # noqa: PLC0415

    images: list[Tensor] = []
    classes: list[Tensor] = []
    for image, label in _pairs(source, labels, count):
        is_batch = image.ndim == 4
        images += image.unbind() if is_batch else [image]
        if label is not None:
            classes += label.flatten().unbind()
        if len(images) >= count:
            break
    images, classes = images[:count], classes[:count]
    if len(images) < FEWEST:
        raise ValueError(
            f"expected {FEWEST} held-out images or more, got {len(images)}. Pass more."
        )
    advice = "Pass a dataset whose transform ends in Resize((height, width)) or CenterCrop(size)."
    taken = stacked("images", images, advice).detach().cpu()
    check_images(taken)
    if len(classes) not in (0, len(images)):
        raise ValueError(
            f"expected a label for each image, or none, got {len(classes)} for {len(images)}. Pass "
            "images alone, or a label with each."
        )
    found = torch.stack(classes).cpu() if classes else None
    if found is not None and bool((found == found[0]).all()):
        warnings.warn(
            "recon_aux.Monitor: expected images of two classes or more, got class "
            f"{found[0].item()} alone, so k-NN is left out. Pass a dataset of more classes, or "
            "shuffle=True to its loader.",
            stacklevel=2,
        )
        return taken, None
    return taken, found


def _pairs(source: Any, labels: Any, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    is_pair = isinstance(source, (tuple, list)) and len(source) == 2
    if is_pair and [getattr(x, "ndim", 1) == 4 for x in source] == [True, False]:
        source, labels = source
    if hasattr(source, "__array_interface__"):
        source = torch.as_tensor(source)
    if isinstance(source, DataLoader) and _in_order(source):
        source = source.dataset
    if isinstance(source, Tensor) and source.ndim != 4:
        raise TypeError(f"expected images (N, C, H, W), got {tuple(source.shape)}. Pass such.")
    is_stream = isinstance(source, IterableDataset)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not is_stream:
        yield from _of_each(source, labels, _spread(len(source), count))
    elif not isinstance(source, Iterable):
        raise TypeError(
            f"expected images as a tensor, a dataset or a loader, got {type(source).__name__}. "
            "Pass one of these."
        )
    elif labels is not None:
        raise TypeError(
            "expected labels= beside a tensor or a dataset, got them beside a "
            f"{type(source).__name__}. Leave labels= out, and let it give each image's label."
        )
    else:
        yield from map(_pair, source)


def _in_order(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives a dataset in its order: the first images may be of one class."""
    batches = loader.batch_sampler
    in_order = type(batches) is BatchSampler and isinstance(batches.sampler, SequentialSampler)
    return in_order and loader.collate_fn is default_collate and loader.worker_init_fn is None


def _of_each(source: Any, labels: Any, rows: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Take images by their index, and labels from beside them where they are given."""
    from recon_aux.probe.inputs import checked_labels  # noqa: PLC0415

    if labels is not None:
        labels = checked_labels("the images'", labels, len(source))
    for row in rows.tolist():
        image, label = _pair(source[row])
        yield image, label if labels is None else labels[row]


def _spread(available: int, count: int) -> Tensor:
    """Give indices over all of a dataset, whose classes may come one after another."""
    taken = min(count, available)
    return torch.arange(taken) * available // max(taken, 1)


def _pair(item: Any) -> tuple[Tensor, Tensor | None]:
    """Find the image, or the batch of images, and its labels in what a dataset or loader gives."""
    values = list(item.values()) if isinstance(item, Mapping) else item
    values = list(values) if isinstance(values, (tuple, list)) else [values]
    found = next(((i, x) for i, x in enumerate(map(_as_image, values)) if x is not None), None)
    if found is None:
        got = [type(value).__name__ for value in values]
        raise TypeError(
            f"expected each item to hold one clean image (C, H, W), got {got}. Pass a dataset "
            "whose transform gives one image, as ToTensor() does, and no list of views."
        )
    place, image = found
    named = [item[key] for key in _LABELS if key in item] if isinstance(item, Mapping) else []
    count = len(image) if image.ndim == 4 else 1
    labels = (_as_label(value, count) for value in named or values[place + 1 :])
    return image, next((label for label in labels if label is not None), None)


def _as_image(value: Any) -> Tensor | None:
    if hasattr(value, "convert") and hasattr(value, "mode"):
        import numpy as np  # noqa: PLC0415

        from recon_aux.probe.inputs import with_eight_bits  # noqa: PLC0415

        value = with_eight_bits(value)
        pixels = torch.from_numpy(np.array(value if value.mode == "L" else value.convert("RGB")))
        return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
    if hasattr(value, "__array_interface__"):
        value = torch.as_tensor(value)
    return value if isinstance(value, Tensor) and value.ndim in (3, 4) else None


def _as_label(value: Any, count: int) -> Tensor | None:
    """Give one whole number for each of so many images, ``(count,)``; None if it is none."""
    if isinstance(value, (int, Tensor)) or (hasattr(value, "item") and hasattr(value, "dtype")):
        label = torch.as_tensor(value)
        is_label = label.numel() == count and not label.is_floating_point()
        return label.flatten() if is_label else None
    return None
