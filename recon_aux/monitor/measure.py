"""What an encoder's features know, and how far they are spread, from a few held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recon_aux.task.splitter import pooled

Parameters = dict[str, Tensor]


@dataclass
class Measurement:
    """What a :class:`~recon_aux.Monitor` found.

    Attributes:
        numbers: by the names under which they are logged.
        picture: of the views and what is rebuilt of them, a ``PIL.Image``; None without a decoder.
    """

    numbers: dict[str, float]
    picture: Any = None


@dataclass
class HeldOut:
    """The held-out images, and the transformations of them that are always the same.

    Attributes:
        images: ``(N, C, H, W)``, uint8 or floats from 0 to 1.
        labels: ``(N,)``, if there are some.
        parameters: of each transformation alone, by its name; each ``(N,)``.
        views: parameters of two views of the first images.
    """

    images: Tensor
    labels: Tensor | None
    parameters: dict[str, Tensor]
    views: tuple[Parameters, Parameters]

    @property
    def images_encoded(self) -> int:
        """How many images go through the encoder in one measurement."""
        return len(self.images) * (1 + len(self.parameters))

    @classmethod
    def draw(cls, images: Tensor, labels: Tensor | None, seed: int) -> HeldOut:
        """Shuffle the images, and draw the parameters."""
        from recon_aux.probe import COMBINED, TRANSFORMATIONS, draw_parameters  # noqa: PLC0415

        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        # the others need colours
        skipped = () if images.shape[1] == 3 else ("saturation", "hue")
        names = [name for name in TRANSFORMATIONS if name not in skipped]
        combined = [name for name in COMBINED if name not in skipped]
        parameters = draw_parameters(len(images), names, generator=generator)
        views = [draw_parameters(len(images), combined, generator=generator) for _ in range(2)]
        return cls(
            images[order],
            None if labels is None else labels[order],
            parameters,
            (views[0], views[1]),
        )


def encode_held_out(
    encode: Callable[[Tensor], Tensor], held_out: HeldOut, batch_size: int, device: torch.device
) -> dict[str, Tensor]:
    """Encode the images as they are, under ``""``, and by each transformation alone.

    Args:
        encode: images ``(B, C, H, W)``, from 0 to 1 -> features.
        held_out: the held-out images.
        batch_size: images in one call.
        device: where images are transformed and encoded.

    Returns:
        Features ``(N, D)`` on the CPU, by the transformation's name.
    """
    from recon_aux.probe import transform  # noqa: PLC0415

    features: dict[str, list[Tensor]] = {}
    for rows in torch.split(torch.arange(len(held_out.images)), batch_size):
        images = as_floats(held_out.images[rows]).to(device)
        for name in ("", *held_out.parameters):
            parameters = {name: held_out.parameters[name][rows]} if name else {}
            feature = pooled(encode(transform(images, parameters)))
            features.setdefault(name, []).append(feature.float().cpu())
    return {name: torch.cat(parts) for name, parts in features.items()}


def describe(
    features: dict[str, Tensor], held_out: HeldOut, equivariant_dim: int
) -> dict[str, float]:
    """Compute the numbers of the whole feature and of each part.

    Args:
        features: as :func:`encode_held_out` gives them.
        held_out: that was encoded. Regressions are fitted on every other image, and tested on the
            others.
        equivariant_dim: how many of the last channels are equivariant.

    Returns:
        Numbers by ``"part/name"``.
    """
    from recon_aux.probe.measure import knn_accuracy, ridge_r2, split_parts  # noqa: PLC0415

    parts = {task: split_parts(x, equivariant_dim) for task, x in features.items()}
    numbers: dict[str, float] = {}
    for part, clean in parts[""].items():
        is_finite = all(bool(found[part].isfinite().all()) for found in parts.values())
        scores: dict[str, float] = {}
        for name, parameter in held_out.parameters.items():
            targets = [{name: parameter[::2]}, {name: parameter[1::2]}]
            both = _halves(torch.cat([clean, parts[name][part]], 1))
            scores[f"r2_{name}"] = ridge_r2(both, targets)[name] if is_finite else math.nan
        found = {"r2": sum(scores.values()) / len(scores), **scores}
        if held_out.labels is not None:
            classes = _halves(held_out.labels)
            found["knn"] = knn_accuracy(_halves(clean), classes) if is_finite else math.nan
        found["rank"] = effective_rank(clean) if is_finite else math.nan
        found["std"] = spread(clean)
        numbers |= {f"{part}/{name}": value for name, value in found.items()}
    return numbers


def _halves(x: Tensor) -> list[Any]:
    """Give every other row to fit on, and the others to test on."""
    return [x[::2].numpy(), x[1::2].numpy()]


def effective_rank(features: Tensor) -> float:
    """Return RankMe: how many directions the features use.

    The exponential of the entropy of the singular values. Garrido, Balestriero, Najman & LeCun,
    "RankMe", ICML 2023, equation 1.

    Args:
        features: ``(N, D)``.

    Returns:
        From 1, collapsed, to the smaller of N and D.

    Example:
        >>> round(effective_rank(torch.eye(4)), 3), round(effective_rank(torch.ones(4, 4)), 3)
        (4.0, 1.0)
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float((-shares * shares.log()).sum().exp())


def spread(features: Tensor) -> float:
    """Return the standard deviation of normalised features over images, averaged over channels.

    It is given in units of its largest value. Chen & He, "Exploring Simple Siamese Representation
    Learning", CVPR 2021, figure 2.

    Args:
        features: ``(N, D)``.

    Returns:
        From 0, collapsed, to 1.

    Example:
        >>> spread(torch.ones(8, 2)), spread(torch.tensor([[1.0], [-1.0]]))
        (0.0, 1.0)
    """
    unit = torch.nn.functional.normalize(features, dim=1)
    return float(unit.std(0, correction=0).mean() * features.shape[1] ** 0.5)


def as_floats(images: Tensor) -> Tensor:
    """Give images as floats from 0 to 1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
