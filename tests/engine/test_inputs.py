"""What an encoder takes and returns: which tensor is the images, where the channels are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

import recon_aux
from helpers.own_code import WIDTH, Trained, encoder, trains, views
from helpers.watching import rebuilt_from

GIVEN: Any = {"backbone": "encoder", "heads": ["head"]}


class Siamese(Trained):
    """Calls the encoder as ``call`` does."""

    def __init__(self, net: nn.Module, call: Callable[[Any, Tensor], Tensor], head: Any) -> None:
        super().__init__()
        self.encoder, self.call, self.head = net, call, head

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z0, z1 = (self.head(self.call(self.encoder, x)) for x in batch)
        return (z0 - z1).square().mean() - z0.std()


class Taking(nn.Module):
    """Makes images of what it is called with."""

    def __init__(self, take: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.take = encoder(), take

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.net(self.take(*args, **kwargs))


def siamese(take: Callable[..., Tensor], call: Callable[[Any, Tensor], Tensor]) -> Siamese:
    return Siamese(Taking(take), call, nn.Linear(WIDTH, 8))


def coordinates(x: Tensor) -> Tensor:
    return torch.rand(len(x), 2, *x.shape[2:])


@dataclass
class Batch:
    images: Tensor


IMAGES = torch.zeros(2, 3, 32, 32)
CALLS: dict[str, tuple[Any, Any, Any]] = {
    "coordinates first": (
        lambda where, x: x + where.mean(),
        lambda net, x: net(coordinates(x), x),
        (coordinates(IMAGES), IMAGES),
    ),
    "a mask of pixels first": (
        lambda mask, pixel_values: mask * pixel_values,
        lambda net, x: net(mask=torch.rand(len(x), 1, 32, 32), pixel_values=x),
        {"mask": torch.ones(2, 1, 32, 32), "pixel_values": IMAGES},
    ),
    "a dataclass": (
        lambda batch: batch.images, lambda net, x: net(Batch(x)), (Batch(IMAGES),)
    ),
    "a dict": (lambda batch: batch["x"], lambda net, x: net({"x": x}), ({"x": IMAGES},)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_images_are_rebuilt_whatever_else_an_encoder_takes(name: str) -> None:
    take, call, example = CALLS[name]
    model = recon_aux.attach(siamese(take, call), **GIVEN, example_input=example)
    seen = rebuilt_from(model)
    batch = views()
    trains(model, batch, batch)
    for images, _ in seen:
        assert all(torch.equal(a, b) for a, b in zip(images, batch, strict=True))


def test_a_dict_that_is_one_argument_may_be_the_example() -> None:
    class OfBatch(Taking):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["x"])

    model = Siamese(OfBatch(lambda x: x), lambda net, x: net({"x": x}), nn.Linear(WIDTH, 8))
    recon_aux.attach(model, **GIVEN, example_input={"x": IMAGES})
    seen, batch = rebuilt_from(model), views()
    trains(model, batch, batch)
    assert [torch.equal(a, b) for a, b in zip(seen[-1][0], batch, strict=True)] == [True, True]


def test_of_several_images_those_are_rebuilt_whose_channels_are_given() -> None:
    def call(net: Any, x: Tensor) -> Tensor:
        return net(torch.rand(len(x), 2, 32, 32), torch.cat([x, x[:, :1]], 1))

    def model() -> Siamese:
        return siamese(lambda radar, optical: radar.mean() + optical[:, 1:], call)

    example = torch.zeros(1, 2, 32, 32), torch.zeros(1, 4, 32, 32)
    with pytest.raises(ValueError, match=r"images of 3 channels, got .*Pass image_channels="):
        recon_aux.attach(model(), **GIVEN, example_input=example)
    trained = recon_aux.attach(model(), **GIVEN, example_input=example, image_channels=4)
    trains(trained, views(), views())


def test_images_with_their_channels_last_are_refused_and_the_advice_helps() -> None:
    with pytest.raises(ValueError, match=r"channels are last.*images\.movedim\(-1, 1\)"):
        recon_aux.attach(
            siamese(lambda x: x.movedim(-1, 1), lambda net, x: net(x)),
            **GIVEN,
            example_input=torch.zeros(1, 32, 32, 3),
        )
    model = recon_aux.attach(
        siamese(lambda x: x, lambda net, x: net(x.movedim(-1, 1))),
        **GIVEN,
        example_input=torch.zeros(1, 3, 32, 32),
    )
    trains(model, views().movedim(2, -1), views().movedim(2, -1))


class Tokens(nn.Module):
    """Tokens of 32-pixel images alone, ``(B, D, N)`` or ``(B, N, D)``."""

    def __init__(self, width: int, channels_first: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 8, 8)
        self.places = nn.Parameter(torch.zeros(width, 16))
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.layer(x).flatten(2) + self.places
        return tokens if self.channels_first else tokens.mT


@pytest.mark.parametrize("width", [24, 16])
@pytest.mark.parametrize("channels_first", [True, False])
def test_tokens_of_one_size_are_known_by_the_heads_width_or_asked_for(
    width: int, channels_first: bool
) -> None:
    class Pooling(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, y: Tensor) -> Tensor:
            return self.layer(y.mean(2 if channels_first else 1))

    def model(layer: nn.Module) -> Siamese:
        net = Tokens(width, channels_first)
        return Siamese(net, lambda net, x: net(x), Pooling(layer))

    given = {**GIVEN, "image_size": 32}
    if width != 16:
        known = recon_aux.attach(model(SimCLRProjectionHead(width, 32, 16)), **given)
        assert known.recon_aux.splitter.feature_dim == width
        trains(known, views(), views())
    with pytest.raises(ValueError, match="shows where its channels are") as refusal:
        recon_aux.attach(
            model(nn.Linear(width, 8) if width == 16 else nn.LayerNorm(width)), **given
        )
    first = "features=lambda output: output.movedim(1, -1)"
    as_it_is = "If they come last, (B, N, D), pass features=lambda output: output."
    assert first in str(refusal.value)
    assert as_it_is in str(refusal.value)
    features: Any = (lambda y: y.movedim(1, -1)) if channels_first else (lambda y: y)
    named = recon_aux.attach(model(nn.Linear(width, 8)), **given, features=features)
    assert named.recon_aux.splitter.feature_dim == width
    if width != 16:
        trains(named, views(), views())
