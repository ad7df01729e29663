"""Count the operations that a step begins, as a GPU would have to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Begun(TorchDispatchMode):
    """Counts the operations that are begun, without views and without compiled kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


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
