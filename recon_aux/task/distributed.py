"""Numbers that all processes of a training must share. All of them must call these functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def are_many() -> bool:
    """Return whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def mean_over_processes(mean: Tensor, count: int) -> Tensor:
    """Average each process's mean, weighted by its number of images."""
    if not are_many():
        return mean
    weighted = torch.cat([mean.flatten() * count, mean.new_tensor([count])])
    distributed.all_reduce(weighted)
    return (weighted[:-1] / weighted[-1]).view_as(mean)


@torch.no_grad()
def agree(values: Sequence[Tensor], known: bool) -> bool:
    """Let processes that lack values take over those of the others.

    This is needed where one process alone has loaded a checkpoint.

    Args:
        values: if only some processes know them, all get the mean over these.
        known: whether this process knows the values.

    Returns:
        Whether the values are known now.
    """
    if not are_many():
        return known
    count = values[0].new_tensor(float(known))
    distributed.all_reduce(count)
    if 0 < count < distributed.get_world_size():
        for value in values:
            value.mul_(float(known))
            distributed.all_reduce(value)
            value.div_(count)
    return bool(count > 0)
