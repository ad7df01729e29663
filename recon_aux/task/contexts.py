"""Change the mode of a module, or the random state, for a while only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode; afterwards each submodule gets back the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed``, on the CPU; afterwards the global random state is as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would seed the GPUs, too
        torch.default_generator.manual_seed(seed)
        yield
