"""Two views of the same images and their features, out of what went through the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recon_aux.engine.hooks import EncoderCall

Pair = tuple[Tensor, Tensor]


def two_views(
    calls: Sequence[EncoderCall], online: Sequence[EncoderCall], given: Any, count: int | None
) -> tuple[Pair, Pair]:
    """Find two views of one size, the largest, of which at least one has a feature with gradient.

    Args:
        calls: what went through the encoder and its copies in one training step.
        online: those calls of them that train the encoder, one or more.
        given: the batch, which shows how many images a view has.
        count: how many views one call got concatenated, where the batch doesn't show it.

    Returns:
        The views, and what the encoder gave for each.

    Raises:
        RuntimeError: if there are no two; the message lists the calls.
    """
    first, *more = largest_views(online)
    if more:
        return (first.image, more[0].image), (first.output, more[0].output)
    size = _view_size(first.image, given, count)
    if size is not None:
        images = torch.split(first.image, size)
        features = torch.split(first.output, size)
        return (images[0], images[1]), (features[0], features[1])
    trained = {id(call.output) for call in online}
    others = [call for call in calls if id(call.output) not in trained]
    # a momentum encoder's first; the encoder's own may be of an evaluation between steps
    others.sort(key=lambda call: call.encoder is first.encoder)
    unknown = False
    for call in others:
        if call.image.shape == first.image.shape:
            ordered = _in_batch_order(call, given, count)
            if ordered is None:
                unknown = True
                continue
            image, feature = ordered
            # two of the batch's own are told apart without a look at their values
            own = is_of(given, image) and is_of(given, first.image)
            if image is not first.image and (own or not torch.equal(image, first.image)):
                return (first.image, image), (first.output, feature.detach())
    if unknown:
        raise RuntimeError(
            "expected a momentum encoder to take a view of the batch, in any order, got images "
            f"{[tuple(call.image.shape) for call in others]} for the encoder's "
            f"{tuple(first.image.shape)}, which aren't in the batch: made within the step, or "
            "another process's, where a batch is shuffled over processes. views=1 says that they "
            "are in the order of the encoder's own, where nothing is shuffled; to shuffle, let the "
            "views stand in the batch; those of another process can't be used"
        )
    raise RuntimeError(
        "expected two views, one in each call of the encoder or concatenated in one, or one of "
        "them in a momentum encoder's, saw calls with gradient of images "
        f"{[tuple(call.image.shape) for call in online]} and others of "
        f"{[tuple(call.image.shape) for call in others]}, where images and labels of the batch "
        f"number {sorted(_batch_sizes(given))}; views= tells how many are concatenated where the "
        "batch doesn't show it; add_loss(model, loss, batch) shows it the batch"
    )


def largest_views(calls: Sequence[EncoderCall]) -> list[EncoderCall]:
    """Give the calls with the largest images; of several with the same images the first."""
    largest = max((call.pixels for call in calls), default=0)
    views: dict[int, EncoderCall] = {}
    for call in calls:
        if call.pixels == largest:
            views.setdefault(id(call.image), call)
    return list(views.values())


def verify_views(views: Pair, given: Any, count: int | None) -> None:
    """Check what the batch shows: that these are two views, each of them whole and in order.

    Args:
        views: that were found.
        given: the batch.
        count: how many views are concatenated, there, too, if so.

    Raises:
        RuntimeError: if they are not.
    """
    shapes = [tuple(view.shape) for view in views]
    advice = (
        "recon_aux needs a call of the encoder for each whole view, or one of all views, one after "
        "the other, in the batch's order"
    )
    if views[0].shape == views[1].shape and torch.equal(*views):
        raise RuntimeError(f"expected two views, saw the same images {shapes[0]} twice; {advice}")
    for view in views:
        known = [x for x in _images(given) if x.shape[1:] == view.shape[1:]]
        joined = [x for x in known if count and len(x) == count * len(view)]
        parts = [*known, *(part for x in joined for part in torch.split(x, len(view)))]
        whole = any(x.shape == view.shape and torch.equal(x, view) for x in parts)
        if known and not whole and _rows_in(view, torch.cat(known)) is not None:
            raise RuntimeError(
                "expected two views of the batch, saw its images in another arrangement, "
                f"{shapes}; {advice}"
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


def _in_batch_order(call: EncoderCall, given: Any, count: int | None) -> Pair | None:
    """Undo a shuffle of the images that a momentum encoder took, as MoCo's, if they are known."""
    # looking at values waits for the device, so identity first
    if count == 1 or is_of(given, call.image):
        return call.image, call.output
    for view in (x for x in _images(given) if x.shape == call.image.shape):
        order = _rows_in(view, call.image)
        if order is not None:
            return view, call.output[order]
    return None


def _rows_in(images: Tensor, among: Tensor) -> Tensor | None:
    """Say where each of some images is among others; None if any is not."""
    marks, known = (x.flatten(1).double().sum(1) for x in (images, among))
    same = marks[:, None] == known[None, :]
    order = same.int().argmax(1)
    return order if torch.equal(among[order], images) else None


def _images(given: Any) -> list[Tensor]:
    """Find the images of a batch, those of stacked views, (B, V, C, H, W) or (V, B, ...), too."""
    tensors = list(_tensors(given))
    stacked = [part for x in tensors if x.ndim == 5 for dim in (0, 1) for part in x.unbind(dim)]
    return [x for x in tensors if x.ndim == 4] + stacked


def is_of(given: Any, image: Tensor) -> bool:
    """Whether images are the batch's own tensor."""
    return any(x is image for x in _tensors(given))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
