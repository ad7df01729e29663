"""Two views of the same images, and their features, out of what went through the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from recon_aux.engine.step import EncoderCall, Pair, tensors_in


def two_views(
    calls: Sequence[EncoderCall],
    online: Sequence[EncoderCall],
    batch: Any,
    count: int | None,
    interleaved: bool,
) -> tuple[Pair, Pair] | None:
    """Find the two largest views of equal size, at least one of them with gradient.

    Args:
        calls: all that went through the encoder and its momentum encoders in one step.
        online: the calls among them that train the encoder, one or more.
        batch: shows how many images a view has.
        count: how many views are concatenated in one call, where the batch doesn't show it.
        interleaved: whether they take turns there, image by image.

    Returns:
        The views, and the encoder's feature of each; None if there are no two.
    """
    views = largest_views(online)
    pairs = ((x, y) for i, x in enumerate(views) for y in views[i + 1 :])
    alike = next((pair for pair in pairs if pair[0].image.shape == pair[1].image.shape), None)
    # two calls of one shape may hold several views each, if the batch shows that
    unsure = alike is not None
    shown = ((x, _shown_size(x.image, batch, count, interleaved, unsure=unsure)) for x in views)
    likely = ((x, _likely_size(x.image, batch, count)) for x in views if not unsure)
    for call, size in chain(shown, likely):
        if size is not None:
            images, features = (parts_of(x, size, interleaved) for x in (call.image, call.feature))
            return (images[0], images[1]), (features[0], features[1])
    if alike is not None:
        one, other = alike
        return (one.image, other.image), (one.feature, other.feature)
    first, others = views[0], candidates(calls, online)
    for call in others:
        ordered = in_batch_order(call, batch, count)
        if ordered is not None:
            image, feature = ordered
            # two tensors of the batch count as different: comparing values waits for the device
            both_in_batch = is_of(batch, image) and is_of(batch, first.image)
            if image is not first.image and (both_in_batch or not torch.equal(image, first.image)):
                return (first.image, image), (first.feature, feature.detach())
    # no second image is as large as the largest: look among the smaller ones
    smaller = [call for call in online if call.pixels < first.pixels]
    return two_views(calls, smaller, batch, count, interleaved) if smaller and not others else None


def parts_of(joined: Tensor, size: int, interleaved: bool) -> Sequence[Tensor]:
    """Split concatenated views into views of ``size`` images each."""
    parts = len(joined) // size
    return [joined[i::parts] for i in range(parts)] if interleaved else torch.split(joined, size)


def candidates(calls: Sequence[EncoderCall], online: Sequence[EncoderCall]) -> list[EncoderCall]:
    """Give the calls that may be of the other view, where one call alone trains the encoder."""
    trained = {id(call.output) for call in online}
    first = largest_views(online)[0]
    others = [call for call in calls if id(call.output) not in trained]
    # the encoder's own may be of an evaluation between steps
    others.sort(key=lambda call: call.encoder is first.encoder)
    return [call for call in others if call.image.shape == first.image.shape]


def largest_views(calls: Sequence[EncoderCall]) -> list[EncoderCall]:
    """Give the calls with the largest images. Of several with the same images the first."""
    largest = max((call.pixels for call in calls), default=0)
    views: dict[int, EncoderCall] = {}
    for call in calls:
        if call.pixels == largest:
            views.setdefault(id(call.image), call)
    return list(views.values())


def _shown_size(
    image: Tensor, batch: Any, count: int | None, interleaved: bool, *, unsure: bool
) -> int | None:
    """Say how many images a view has, where the batch shows that one call got several views.

    The batch shows it by a tensor of a view's length, or by holding the first view itself.

    Args:
        image: what the call got.
        batch: the step's.
        count: how many views there are, if the user says so.
        interleaved: whether they take turns.
        unsure: whether sizes alone can't show it.
    """
    known = batch_sizes(batch)
    if count is not None:
        size = _likely_size(image, batch, count)
        return size if not known or (size in known and not is_of(batch, image)) else None
    fitting = {size for size in known if len(image) % size == 0}
    smaller = {size for size in fitting if 2 * size <= len(image)}
    # comparing values waits for the device
    if not smaller or not (unsure or len(fitting) > 1) or is_of(batch, image):
        return None
    first = {size: parts_of(image, size, interleaved)[0] for size in smaller}
    known_images = images_in(batch, image.device)
    shown = {len(x) for x in known_images if len(x) in first and _same(x, first[len(x)])}
    return shown.pop() if len(shown) == 1 else None


def _likely_size(image: Tensor, batch: Any, count: int | None) -> int | None:
    """Say how many images a view has, by numbers alone, if one call got several views."""
    if count is not None:
        size, rest = divmod(len(image), count)
        return size if count > 1 and not rest else None
    fitting = [size for size in batch_sizes(batch) if len(image) % size == 0]
    return fitting[0] if len(fitting) == 1 and 2 * fitting[0] <= len(image) else None


def _same(images: Tensor, others: Tensor) -> bool:
    alike = images.shape == others.shape and images.dtype == others.dtype
    return alike and torch.equal(images, others)


def batch_sizes(batch: Any) -> set[int]:
    """Say how many images, or else labels, a batch has."""
    tensors = [x for x in tensors_in(batch) if len(x)]
    images = {len(x) for x in tensors if x.ndim == 4}
    return images or {len(x) for x in tensors if x.ndim == 1}


def in_batch_order(call: EncoderCall, batch: Any, count: int | None) -> Pair | None:
    """Undo the shuffle of a momentum encoder's images, as MoCo's; None if the batch lacks them."""
    # comparing values waits for the device, so identity first
    if count == 1 or is_of(batch, call.image):
        return call.image, call.feature
    for view in (x for x in images_in(batch, call.image.device) if x.shape == call.image.shape):
        order = rows_in(view, call.image)
        if order is not None:
            return view, call.feature[order]
    return None


def rows_in(images: Tensor, among: Tensor) -> Tensor | None:
    """Give each image's row among other images; None if one of them isn't there."""
    if images.shape == among.shape and torch.equal(images, among):
        # rows may be equal, as blank ones
        return torch.arange(len(images), device=images.device)
    marks, known = (x.flatten(1).double().sum(1) for x in (images, among))
    same = marks[:, None] == known[None, :]
    order = same.int().argmax(1)
    return order if torch.equal(among[order], images) else None


def images_in(batch: Any, device: torch.device) -> list[Tensor]:
    """Find a batch's images, those of stacked views, (B, V, C, H, W) or (V, B, ...), too.

    A step may move its batch itself. So they are moved to the device of what was encoded.
    """
    tensors = [x.to(device) for x in tensors_in(batch) if x.ndim in (4, 5) and len(x)]
    stacked = [part for x in tensors if x.ndim == 5 for dim in (0, 1) for part in x.unbind(dim)]
    return [x for x in tensors if x.ndim == 4] + stacked


def is_of(batch: Any, image: Tensor) -> bool:
    """Whether images are the batch's own tensor."""
    return any(x is image for x in tensors_in(batch))
