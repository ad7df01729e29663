"""Features and pictures for the task alone, without a model."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

# for what is drawn by hypothesis
few = settings(max_examples=25, deadline=None)

SHAPES = {"vector": (4, 12), "map": (4, 12, 3, 2), "tokens": (4, 7, 12)}


def views_and_features(batch: int = 4, dim: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(2, batch, 3, 32, 32), torch.rand(2, batch, dim)


def smooth_pictures(count: int, seed: int = 0) -> Tensor:
    """Pictures without detail, which move smoothly."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)
