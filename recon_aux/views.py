"""Two views of the same images and their features, out of what went through the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .intercept import EncoderCall

Pair = tuple[Tensor, Tensor]


def two_views(
    calls: Sequence[EncoderCall], encoder: nn.Module, given: Any, count: int | None
) -> tuple[Pair, Pair]:
    """Find two views of one size, the largest, of which at least one has a feature with gradient.

    Args:
        calls: what went through the encoder and its copies in one training step.
        encoder: the one that is trained.
        given: the batch, which shows how many images a view has.
        count: how many views one call got concatenated, where the batch doesn't show it.

    Returns:
        The views, and what the encoder gave for each.

    Raises:
        RuntimeError: if there are no two; the message lists the calls.
    """
    online = [call for call in calls if call.encoder is encoder and call.output.requires_grad]
    largest = max(call.image.shape[-2:].numel() for call in online)
    # of several calls with the same images the first counts
    views: dict[int, EncoderCall] = {}
    for call in online:
        if call.image.shape[-2:].numel() == largest:
            views.setdefault(id(call.image), call)
    first, *more = views.values()
    if more:
        return (first.image, more[0].image), (first.output, more[0].output)
    size = _view_size(first.image, given, count)
    if size is not None:
        images = torch.split(first.image, size)
        features = torch.split(first.output, size)
        return (images[0], images[1]), (features[0], features[1])
    others = [
        call for call in calls if call.encoder is not encoder or not call.output.requires_grad
    ]
    for call in others:
        if call.image.shape == first.image.shape:
            image, feature = _in_batch_order(call, first.image, given)
            if not torch.equal(image, first.image):
                return (first.image, image), (first.output, feature.detach())
    with_gradient = [tuple(call.image.shape) for call in online]
    without = [tuple(call.image.shape) for call in others]
    raise RuntimeError(
        "expected two views, one in each call of the encoder or concatenated in one, or one of "
        f"them in a momentum encoder's, saw calls with gradient of images {with_gradient} and "
        f"others of {without}, where images and labels of the batch number "
        f"{sorted(_batch_sizes(given))}; views= tells how many are concatenated where the batch "
        "doesn't show it"
    )


def _view_size(image: Tensor, given: Any, count: int | None) -> int | None:
    """Say how many images each of the views has that one call got concatenated."""
    if count is None:
        sizes = _batch_sizes(given)
    else:
        sizes = {len(image) // count} if len(image) % count == 0 else set()
    fitting = {size for size in sizes if len(image) % size == 0}
    if len(fitting) == 1 and (size := fitting.pop()) * 2 <= len(image):
        return size
    return None


def _batch_sizes(given: Any) -> set[int]:
    tensors = [x for x in _tensors(given) if len(x)]
    images = {len(x) for x in tensors if x.ndim == 4}
    return images or {len(x) for x in tensors if x.ndim == 1}


def _in_batch_order(call: EncoderCall, online: Tensor, given: Any) -> Pair:
    """Undo a shuffle of the images that a momentum encoder took, as MoCo's."""
    known = [x for x in _tensors(given) if x.shape == call.image.shape]
    # looking at values waits for the device, so identity first
    if any(x is call.image for x in known) or any(torch.equal(x, call.image) for x in known):
        return call.image, call.output
    mark = call.image.flatten(1).sum(1)
    for view in known:
        same = mark[None, :] == view.flatten(1).sum(1)[:, None]
        order = same.int().argmax(1)
        if same.any(1).all() and torch.equal(call.image[order], view):
            return view, call.output[order]
    if any(torch.equal(view, online) for view in known):
        raise RuntimeError(
            "expected the momentum encoder to take the batch's other view, in any order, got "
            "images that this process has not been given; where a batch is shuffled over processes "
            "recon_aux can't tell which feature belongs to which image: shuffle within each, or "
            "train with one process"
        )
    # neither view is in the batch: they were made within the step
    return call.image, call.output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
