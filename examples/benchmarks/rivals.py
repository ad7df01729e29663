"""Methods that also learn what changes between views, to compare recon_aux with.

Some are given what changed, see :func:`benchmarks.images.change_between`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from benchmarks.images import (
    CHANGE_DIM,
    change_back,
    denormalize,
    normalize,
    spread_of_change,
)
from benchmarks.methods import Method, SimCLR, VICReg
from benchmarks.sie import SIE
from recon_aux.probe import SETS, transform

MakeMethod = Callable[[nn.Module, int, float], Method]


def numbers_of(change: Tensor) -> dict[str, Tensor]:
    """Say what changed by numbers of a standard deviation of about 1, kind by kind.

    Args:
        change: ``(N, 11)``, of :func:`benchmarks.images.change_between`.

    Returns:
        ``(N, K)`` of each kind. ``mirrored`` is 1 where one view alone is mirrored, or else 0.
    """
    matrix = change[:, :4].unflatten(1, (2, 2))
    # of both views, if they aren't mirrored alike: a turn of the mirrored image
    turn = torch.atan2(-matrix[:, 0, 1], matrix[:, 1, 1]).rad2deg()
    return {
        "rotation": turn[:, None] / spread_of_change("rotation"),
        "mirrored": (torch.linalg.det(matrix) < 0).float()[:, None],
        "place": change[:, 4:7],
        "colour": change[:, 7:],
    }


class AugSelf(Method):
    """Beside a method, predict what changed between the views.

    Lee et al., "Improving Transferability of Representations via Augmentation-Aware
    Self-Supervision", NeurIPS 2021, arXiv 2111.09613. As in the authors' code, an MLP of three
    layers for each kind of change reads the features of both views, in both orders. It regresses
    numbers, or says whether one view is mirrored. The errors of all kinds are added.

    Ours: the numbers are what changed from one view to the other, so that flips don't hide it. They
    have a standard deviation of 1, and no bounds.

    Args:
        backbone: images -> ``(B, feature_dim)``.
        feature_dim: channels of the feature.
        lr: highest learning rate.
        method: the method.
        weight: of the errors, 1 in the paper.
        hidden: channels of the MLPs' hidden layers.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        lr: float,
        *,
        method: MakeMethod,
        weight: float = 1.0,
        hidden: int = 512,
    ) -> None:
        made = method(backbone, feature_dim, lr)
        super().__init__(backbone, made.projection_head, made.criterion, lr)
        self.weight = weight
        widths = {kind: x.shape[1] for kind, x in numbers_of(torch.zeros(1, CHANGE_DIM)).items()}
        self.predict = nn.ModuleDict(
            {
                kind: nn.Sequential(
                    nn.Linear(2 * feature_dim, hidden, bias=False),
                    nn.BatchNorm1d(hidden),
                    nn.ReLU(),
                    nn.Linear(hidden, hidden, bias=False),
                    nn.BatchNorm1d(hidden),
                    nn.ReLU(),
                    nn.Linear(hidden, width),
                )
                for kind, width in widths.items()
            }
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of two views, labels and changes."""
        views, (_, change) = batch
        y0, y1 = (self.backbone(x).flatten(1) for x in views)
        loss: Tensor = self.criterion(self.projection_head(y0), self.projection_head(y1))
        pairs = torch.cat([torch.cat([y0, y1], dim=1), torch.cat([y1, y0], dim=1)])
        both = torch.cat([change, change_back(change)])
        for kind, wanted in numbers_of(both).items():
            predicted = self.predict[kind](pairs).float()
            error = F.binary_cross_entropy_with_logits if kind == "mirrored" else F.mse_loss
            loss = loss + self.weight * error(predicted, wanted)
        return loss


class Intermediate(Method):
    """Beside a method, rebuild images on the way from the second view to a transformation of it.

    Wang et al., "Self-Supervised Learning Based on Transformed Image Reconstruction for
    Equivariance-Coherent Feature Representation", AAAI 2026, arXiv 2503.18753. No code is public.
    This is written from the paper's description. The second view is transformed once more, by
    rotation, colour, blur and translation with the paper's ranges. One decoder rebuilds the image
    a third of the way, another two thirds of it, from the equivariant parts of both views. The
    method sees the invariant parts. The decoders' widths are ours.

    Args:
        backbone: images -> ``(B, feature_dim)``.
        feature_dim: channels of the feature; the last half is equivariant.
        lr: highest learning rate.
        method: the method.
        weight: of the mean squared error, 1 in the paper.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        lr: float,
        *,
        method: MakeMethod,
        weight: float = 1.0,
    ) -> None:
        split = feature_dim // 2
        made = method(backbone, split, lr)
        super().__init__(backbone, made.projection_head, made.criterion, lr)
        self.split = split
        self.equivariant_dim = feature_dim - split
        self.weight = weight
        self.decoders = nn.ModuleList(_decoder(2 * self.equivariant_dim) for _ in WAY)
        self.seed = torch.initial_seed()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of two views."""
        (x0, x1), _ = batch
        images = denormalize(x1)
        # from the step's number, so that an interrupted run goes on with the same ones
        seed = (self.seed + 1_000_003 * self.global_step) % 2**63
        generator = torch.Generator(x1.device).manual_seed(seed)
        made = SETS["paper"]
        drawn = made.draw(len(images), list(made.ranges), generator)
        y0, y1 = (self.backbone(x).flatten(1) for x in (x0, normalize(transform(images, drawn))))
        invariant = [self.projection_head(y[:, : self.split]) for y in (y0, y1)]
        loss: Tensor = self.criterion(*invariant)
        equivariant = torch.cat([y[:, self.split :] for y in (y0, y1)], dim=1)
        for decoder, share in zip(self.decoders, WAY, strict=True):
            target = normalize(transform(images, part_of_the_way(drawn, share)))
            target = F.interpolate(target, SIDE, mode="bilinear", antialias=True)
            loss = loss + self.weight * F.mse_loss(decoder(equivariant).float(), target) / len(WAY)
        return loss


WAY = (1 / 3, 2 / 3)
"""How far on the way the images are that :class:`Intermediate` rebuilds."""

SIDE = 32
"""Their side, in pixels."""


def part_of_the_way(parameters: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Give the parameters of a transformation that goes a share of the way."""
    # factors start at 1, all others at 0
    start = dict.fromkeys(["brightness", "contrast", "saturation"], 1.0)
    return {
        name: start.get(name, 0.0) + share * (values - start.get(name, 0.0))
        for name, values in parameters.items()
    }


def _decoder(feature_dim: int, width: int = 64) -> nn.Module:
    """A linear layer and four convolutions: ``(B, feature_dim)`` -> ``(B, 3, SIDE, SIDE)``."""
    layers: list[nn.Module] = [
        nn.Linear(feature_dim, 2 * width * 4 * 4),
        Rearrange("b (c h w) -> b c h w", h=4, w=4),
    ]
    channels = [2 * width, 2 * width, width, width]
    for i, o in pairwise(channels):
        layers += [nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels[-1], 3, 3, padding=1))


BASES: dict[str, MakeMethod] = {"SimCLR": SimCLR, "VICReg": VICReg}

GIVEN: dict[str, Any] = {
    "SIE given rotation": partial(SIE, change_dim=4),
    "SIE given all": partial(SIE, change_dim=CHANGE_DIM),
    **{f"{name} + AugSelf": partial(AugSelf, method=method) for name, method in BASES.items()},
}
"""Methods that are given what changed between the views, by name."""

RIVALS: dict[str, Any] = {
    **GIVEN,
    **{
        f"{name} + intermediate": partial(Intermediate, method=method)
        for name, method in BASES.items()
    },
}
"""All rivals, by name. SIE is VICReg by itself."""
