"""Check what the probe and the monitor are given: images, labels, what normalises, features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensors(name: str, given: Any) -> tuple[Tensor, Tensor | None]:
    """Check a split, and make tensors of arrays and lists.

    Args:
        name: of the split, for messages.
        given: images ``(N, 3, H, W)``, and integer labels ``(N,)`` or None.

    Returns:
        Images, uint8 or float32 from 0 to 1, and labels ``(N,)`` or None.

    Raises:
        TypeError: if it isn't a pair.
        ValueError: if images have another shape or range, or labels don't fit them.

    Example:
        >>> images, labels = as_tensors("train", (np.zeros((4, 3, 2, 2)), [0, 1, 0, 1]))
        >>> images.dtype, labels.shape
        (torch.float32, torch.Size([4]))
    """
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(
            f"expected {name} as (images, labels), got {type(given).__name__}. Pass a tuple of "
            "images (N, 3, H, W) and labels (N,), or (images, None)."
        )
    images, labels = given
    if isinstance(images, (tuple, list)) and images and isinstance(images[0], Tensor):
        images = stacked(f"{name}'s images", images, "Pass images that were resized to one.")
    images = None if images is None else torch.as_tensor(images)
    if images is None or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"expected {name}'s images as (N, 3, H, W), got "
            f"{None if images is None else tuple(images.shape)}. Pass such: "
            "torch.as_tensor(images).movedim(-1, 1) of (N, H, W, 3), "
            "torch.as_tensor(images).expand(-1, 3, -1, -1) of grey ones."
        )
    if len(images) < 2:
        raise ValueError(
            f"expected two images or more in {name}, got {len(images)}. Pass more images."
        )
    check_images(images)
    images = images.float() if images.is_floating_point() else images
    if labels is None:
        return images, None
    labels = checked_labels(f"{name}'s", labels, len(images))
    if name == "train" and int(labels.min()) == int(labels.max()):
        raise ValueError(
            f"expected train's labels of two classes or more, got {labels[0].item()} alone. Pass "
            "None in their place to measure no accuracies."
        )
    return images, labels


def stacked(what: str, images: Sequence[Tensor], advice: str) -> Tensor:
    """Make one tensor of images.

    Raises:
        ValueError: if they are of several sizes; the message begins and ends as given.
    """
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(f"expected {what} of one size, got {sorted(sizes)[:3]}. {advice}")
    return torch.stack(tuple(images))


def checked_labels(whose: str, given: Any, count: int) -> Tensor:
    """Check that there is one class for each image; ``(N, 1)`` will do.

    Args:
        whose: the labels' owner, for the message.
        given: labels ``(N,)`` or of another shape with as many numbers.
        count: how many images there are.

    Returns:
        Labels ``(N,)``, on the CPU.

    Raises:
        ValueError: if there are more or fewer, or if they aren't whole numbers.
    """
    try:
        labels = torch.as_tensor(given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected {whose} labels as whole numbers, got others ({error}). If they are names, "
            "pass numpy.unique(labels, return_inverse=True)[1]."
        ) from error
    if labels.numel() != count or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"expected {whose} labels as {count} whole numbers, one for each image, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}. Pass such: labels.long() of floats, "
            "labels.argmax(1) of one column for each class; or None if there are no labels."
        )
    return labels.flatten().cpu()


def check_pairs(pairs: tuple[int, int]) -> None:
    """Refuse numbers of images that are too small to compute an R².

    Raises:
        ValueError: if one is less than 2.
    """
    if len(pairs) != 2 or min(pairs) < 2:
        raise ValueError(
            f"expected pairs= as two whole numbers of 2 or more, got {pairs}. Pass such, as "
            "(5000, 2000)."
        )


def checked_output(output: Any) -> Tensor:
    """Refuse an encoder's output that is no tensor.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            "expected the encoder to return a tensor (B, D), (B, D, H, W) or (B, N, D), got "
            f"{type(output).__name__}. Pass a function that takes it from there, as "
            "lambda images: encoder(images)[0], or to Monitor encode=lambda model, images: "
            "model.encoder(images)[0]."
        )
    return output


def checked_feature(output: Any) -> Tensor:
    """Refuse what is no finite feature.

    Args:
        output: what an encoder returned.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it holds a NaN or an infinity.
    """
    feature = checked_output(output)
    finite = feature.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"expected finite features, got NaN or infinity for {int((~finite).sum())} of "
            f"{len(finite)} images. Pass images as in the training, and look for NaN in the "
            "encoder's weights."
        )
    return feature


def with_eight_bits(image: Any) -> Any:
    """Let an image of 16 bits keep its contrast: ``convert("RGB")`` alone makes it white.

    Args:
        image: a ``PIL.Image``.

    Returns:
        A grey one of 8 bits; an image that has 8 bits stays as it is.

    Raises:
        ValueError: if its pixels are floats, or whole numbers of more than 16 bits.

    Example:
        >>> from PIL import Image
        >>> image = Image.fromarray(np.full((2, 2), 65535, np.uint16))
        >>> with_eight_bits(image).getpixel((0, 0))
        255
    """
    if image.mode[0] not in "IF":
        return image
    # only a caller who passes an image of Pillow needs Pillow
    from PIL import Image  # noqa: PLC0415

    pixels = np.array(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"expected an image of 8 or 16 bits, got mode {image.mode} from {pixels.min():.4g} to "
            f"{pixels.max():.4g}. Save it with 8 bits."
        )
    return Image.fromarray((pixels / 257).round().astype(np.uint8))


def as_floats(images: Tensor) -> Tensor:
    """Give bytes as floats from 0 to 1, and floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def check_images(images: Tensor) -> None:
    """Refuse images that aren't uint8, or floats from 0 to 1.

    Raises:
        ValueError: if they are of another kind, or beyond 0 and 1.

    Example:
        >>> check_images(torch.full((1, 3, 2, 2), 255.0))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: expected images as uint8 or as floats from 0 to 1, got ... Divide them by 255.
    """
    if not images.numel():
        return
    # torch's aminmax doesn't take these types
    others = (torch.bool, torch.uint16, torch.uint32, torch.uint64)
    values = images.long() if images.dtype in others else images
    low, high = (float(x) for x in values.aminmax())
    if images.dtype == torch.uint8 and high != 1:
        return
    # resizing may overshoot a little
    if images.is_floating_point() and low > -0.1 and high < 1.1:
        return
    if low < 0:
        advice = "Leave Normalize out of their transform, and pass it as normalize=."
    elif high <= 1:
        advice = "Pass images.float()."
    elif images.is_floating_point() and high < 256:
        advice = "Divide them by 255."
    elif high < 256:
        advice = "Pass images.to(torch.uint8)."
    else:
        advice = "Divide them, as floats, by the largest value that they may have, as 65535."
    raise ValueError(
        f"expected images as uint8 or as floats from 0 to 1, got {images.dtype} from {low:.5g} to "
        f"{high:.5g}. {advice}"
    )


def check_normalize(normalize: Any) -> None:
    """Refuse means and deviations where a function of images is expected.

    Raises:
        TypeError: if it can't be called.

    Example:
        >>> check_normalize(torch.nn.Identity())
    """
    if normalize is not None and not callable(normalize):
        raise TypeError(
            f"expected normalize= as a function of images, got {type(normalize).__name__}. Pass "
            "normalize=torchvision.transforms.Normalize(mean, std)."
        )
