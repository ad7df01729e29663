"""Count the operations that a training step begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.operations import Begun


def operations_begun(model: Any, pictures: Tensor) -> tuple[int, int]:
    """Train a model, and count the operations of its sixth step, forward and backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # checks of the first steps are done by the sixth
    for _ in range(6):
        views = [(pictures + 0.02 * torch.rand_like(pictures)) for _ in range(2)]
        optimizer.zero_grad()
        with Begun() as forward:
            loss = model.training_step((views, None), 0)
        with Begun() as backward:
            loss.backward()
        optimizer.step()
    return forward.count, backward.count
