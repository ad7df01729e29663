"""Probe the encoders of several checkpoints, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from recon_aux.cli.errors import UserError
from recon_aux.cli.finding import Encoder, Saved
from recon_aux.cli.images import Images, Normalization
from recon_aux.cli.picture import Rebuilder
from recon_aux.cli.report import as_json
from recon_aux.probe import ProbeResult, probe


@dataclass
class Probed:
    """What was measured, by the name of the checkpoint.

    Attributes:
        images: those that the last encoder saw.
        encoders: what was found in the files.
        results: what the probe measured.
        rebuilders: of those that recon_aux was attached to.
    """

    images: Images
    encoders: dict[str, Encoder]
    results: dict[str, ProbeResult]
    rebuilders: dict[str, Rebuilder]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        checkpoints = {
            name: {
                "arch": encoder.arch,
                "prefix": encoder.prefix,
                "parts": as_json(self.results[name]),
            }
            for name, encoder in self.encoders.items()
        }
        return {"images": str(self.images), "checkpoints": checkpoints}


def probe_all(
    found: Mapping[str, tuple[Encoder, Saved | None]],
    load: Callable[[int | None], Images],
    normalization: Normalization,
    device: torch.device,
    console: Console,
    regressor: str = "ridge",
) -> Probed:
    """Probe encoders, and say which.

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
    results: dict[str, ProbeResult] = {}
    rebuilders: dict[str, Rebuilder] = {}
    loaded: dict[int | None, Images] = {}
    for name, (encoder, saved) in found.items():
        module = encoder.build().to(device)
        size = encoder.input_size(module)
        if size not in loaded:
            loaded[size] = load(size)
        images = loaded[size]
        console.print(f"{name}: {encoder}", highlight=False, markup=False)
        split = saved.equivariant_dim if saved is not None else 0
        results[name] = _probe(module, images, name, split, normalization, device, regressor)
        aux = saved.build() if saved is not None else None
        if aux is not None:
            rebuilders[name] = Rebuilder(module, aux, normalization)
    encoders = {name: encoder for name, (encoder, _) in found.items()}
    return Probed(images, encoders, results, rebuilders)


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


def _probe(
    module: nn.Module,
    images: Images,
    name: str,
    equivariant_dim: int,
    normalization: Normalization,
    device: torch.device,
    regressor: str,
) -> ProbeResult:
    blank = images.train[0][:2].float().to(device) / 255
    try:
        with torch.no_grad():
            width = module(normalization(blank)).flatten(1).shape[1]
    except (ValueError, RuntimeError, TypeError, AssertionError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"expected {name}'s encoder to give features of {images.size}x{images.size} images, "
            f"got: {reason}. Pass another --size, or --arch with a function that builds it."
        ) from error
    if equivariant_dim > width:
        raise UserError(
            f"expected {name}'s feature to have the {equivariant_dim} equivariant channels that it "
            f"was saved with, got {width} in all. Pass --arch with the architecture that was "
            "trained."
        )
    return probe(
        module,
        images.train,
        images.test,
        equivariant_dim=equivariant_dim,
        normalize=normalization,
        regressor=regressor,
        device=device,
        progress=True,
    )
