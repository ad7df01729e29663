"""When the views take turns: once for each optimizer step, however often a step calls the task."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass
class _Turn:
    is_due: bool = True
    # whether one of torch's optimizers steps the module; None until that is known
    has_optimizer: bool | None = None


# kept beside the modules, so that copies and pickles start anew
_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def takes_turn(module: nn.Module) -> bool:
    """Return whether a call is a module's first one since its parameters' last optimizer step.

    Every call is, where no optimizer of torch's steps them.
    """
    _watch_optimizers()
    turn = _turns.setdefault(module, _Turn())
    if not turn.is_due and turn.has_optimizer is None:
        # a second call before any step: the first step of SAM, say, or there is no optimizer
        turn.has_optimizer = any(
            _steps(x, module) for x in gc.get_objects() if issubclass(type(x), Optimizer)
        )
    is_trained = turn.has_optimizer and any(p.requires_grad for p in module.parameters())
    was_due, turn.is_due = turn.is_due, False
    return was_due or not is_trained


def start_turn(module: nn.Module) -> None:
    """Let a module's next call take a turn, as that of a new module."""
    _turns.pop(module, None)


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _note_step(optimizer: Optimizer, *_: Any) -> None:
    for module, turn in list(_turns.items()):
        if _steps(optimizer, module):
            turn.is_due = turn.has_optimizer = True


def _steps(optimizer: Optimizer, module: nn.Module) -> bool:
    ours = {id(p) for p in module.parameters()}
    groups = getattr(optimizer, "param_groups", ())
    return any(id(p) in ours for group in groups for p in group["params"])
