"""Change the mode of a module, or the random state, for a while only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: object) -> Iterator[None]:
    """Put a module into eval mode. Afterwards each of its submodules is in the mode it was in.

    Args:
        module: a function is taken, too, and left as it is.

    Example:
        >>> module = nn.Dropout()
        >>> with evaluating(module):
        ...     print(module.training)
        False
        >>> module.training
        True
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
    """Draw on the CPU, from ``seed``. Afterwards the global random state is as it was.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(3)
        >>> with seeded(0):
        ...     print(torch.equal(first, torch.rand(3)))
        True
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would seed the GPUs, too
        torch.default_generator.manual_seed(seed)
        yield
