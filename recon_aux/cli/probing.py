"""Probe the encoders of several checkpoints, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torchvision.transforms import Normalize

from recon_aux.cli.errors import UserError
from recon_aux.cli.finding import Encoder, Saved
from recon_aux.cli.images import Images
from recon_aux.cli.picture import Rebuilder
from recon_aux.probe import ProbeResult, probe
from recon_aux.task.splitter import channel_dim


@dataclass
class Probed:
    """What was measured, by the name of the checkpoint.

    Attributes:
        images: those that each encoder saw.
        encoders: what was found in the files.
        results: what the probe measured.
        rebuilders: of those whose views can be rebuilt.
    """

    images: dict[str, Images]
    encoders: dict[str, Encoder]
    results: dict[str, ProbeResult]
    rebuilders: dict[str, Rebuilder]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        checkpoints = {
            name: {
                "arch": encoder.arch,
                "prefix": encoder.prefix,
                "images": str(self.images[name]),
                "parts": self.results[name].to_dict(),
            }
            for name, encoder in self.encoders.items()
        }
        return {"checkpoints": checkpoints}


def probe_all(
    found: Mapping[str, tuple[Encoder, Saved | None]],
    load: Callable[[int | None], Images],
    normalization: Normalize,
    device: torch.device,
    console: Console,
    regressor: str,
) -> Probed:
    """Probe encoders, and print which one each checkpoint holds.

    Args:
        found: what is in each checkpoint, one or more, by its name.
        load: gives images of the size that an encoder needs, or None if it takes any.
        normalization: what the images go through.
        device: where to encode.
        console: where to print.
        regressor: what reads the transformations' parameters.

    Raises:
        UserError: if an encoder doesn't take the images.
    """
    probed = Probed({}, {name: encoder for name, (encoder, _) in found.items()}, {}, {})
    for name, (encoder, saved) in found.items():
        module = encoder.build().to(device)
        images = probed.images[name] = load(encoder.input_size(module))
        console.print(f"{name}: {encoder}")
        _check(name, encoder, saved, _width(module, images, name, normalization, device))
        try:
            probed.results[name] = probe(
                module,
                images.train,
                images.test,
                equivariant_dim=saved.equivariant_dim if saved is not None else 0,
                normalize=normalization,
                regressor=regressor,
                device=device,
                progress=True,
            )
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        if saved is None:
            continue
        aux = None if saved.keeps_positions or saved.is_off else saved.build()
        if aux is not None:
            probed.rebuilders[name] = Rebuilder(module, aux, normalization, images.test[0])
            continue
        reason = "its options can't be read, as in an average of weights: no parts are measured"
        if saved.keeps_positions:
            reason = f"it learned from features of each position; {encoder.arch} gives one of all"
        elif saved.is_off:
            reason = "it was attached with weight=0, so its decoder was never trained"
        elif saved.values:
            reason = "this version of recon_aux can't build its decoder"
        console.print(f"{name}: recon_aux was attached, but nothing is rebuilt: {reason}.")
    return probed


def short_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Name checkpoints by the last parts of their paths, as few as tell them apart.

    Example:
        >>> list(short_names([Path("runs/a/last.ckpt"), Path("runs/b/last.ckpt")]))
        ['a/last.ckpt', 'b/last.ckpt']
    """
    unique = list(dict.fromkeys(paths))
    depth = 1
    while len({path.parts[-depth:] for path in unique}) < len(unique):
        depth += 1
    return {"/".join(path.parts[-depth:]): path for path in unique}


def _width(
    module: nn.Module,
    images: Images,
    name: str,
    normalization: Normalize,
    device: torch.device,
) -> int:
    """Give the width of an encoder's feature."""
    some = images.train[0][:2].float().to(device) / 255
    try:
        with torch.no_grad():
            feature = module(normalization(some))
            return int(feature.shape[channel_dim(feature)])
    except (ValueError, RuntimeError, TypeError, AssertionError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"expected {name}'s encoder to give features of {images.size}x{images.size} images, "
            f"got: {reason}. Pass another --size, or --arch with a function that builds it."
        ) from error


def _check(name: str, encoder: Encoder, saved: Saved | None, width: int) -> None:
    """Refuse a feature that is wider or narrower than the one that recon_aux split."""
    trained = width if saved is None else saved.options.get("feature_dim", width)
    if trained != width:
        raise UserError(
            f"expected {name}'s feature to have the {trained} channels that recon_aux was attached "
            f"to, got {width} from {encoder.arch}. Pass --arch with a function that builds the "
            "encoder that was trained, as --arch my_code:build_encoder."
        )
