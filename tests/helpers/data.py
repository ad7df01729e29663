"""Views that are always the same, whatever was drawn before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset


def batch(size: int = 8, channels: int = 3, side: int = 32) -> tuple[list[Tensor], Tensor]:
    """Two views of random pixels, and labels."""
    generator = torch.Generator().manual_seed(1)
    views = list(torch.rand(2, size, channels, side, side, generator=generator))
    return views, torch.arange(size) % 4


def shaded_views(
    count: int, size: int = 4, channels: int = 3, side: int = 32, seed: int = 1
) -> list[Tensor]:
    """Blurry images, which a small decoder can learn, in other shades in each view."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(size, channels, 2, 2, generator=generator)
    images = F.interpolate(coarse, side, mode="bilinear")
    shades = torch.rand(count, size, channels, 1, 1, generator=generator)
    return [images * (0.5 + 0.5 * shade) for shade in shades]


class Views(Dataset[Any]):
    """Pairs of views, the same for each index."""

    def __init__(self, size: int = 16, side: int = 16) -> None:
        self.size, self.side = size, side

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(index)
        return list(torch.rand(2, 3, self.side, self.side, generator=generator)), index % 4
