"""Change the mode of a module, or the random state, for a while only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: object) -> Iterator[None]:
    """Put a module into eval mode; afterwards each submodule gets back the mode it had.

    A function is accepted, too, and left as it is.
    """
    modes = [(m, m.training) for m in module.modules()] if isinstance(module, nn.Module) else []
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
