"""Whose turn it is: views take turns by optimizer step, not by call."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


@dataclass
class _Turn:
    """What is known of a module's calls and of its optimizer's steps.

    Attributes:
        state: new, begun (called once), taken (waits for a step), due (a step came), or each call.
        version: of its weights, at its last call.
        changes: how often they changed between calls since an optimizer's last step.
    """

    version: int
    state: str = "new"
    changes: int = 0


# kept beside the modules, so that copies and pickles start anew
_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_running: WeakSet[Optimizer] = WeakSet()
_before_steps = cache(register_optimizer_step_pre_hook)
_after_steps = cache(register_optimizer_step_post_hook)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def takes_turn(module: nn.Module) -> bool:
    """Return whether this is a module's first call after a step of one of torch's optimizers.

    SAM, LBFGS and accumulated gradients call a module several times for one step. If a module
    is frozen, or no such optimizer updates it, every call takes a turn.
    """
    _before_steps(_note_start)
    _after_steps(_note_step)
    version = version_of(module.parameters())
    turn = _turns.setdefault(module, _Turn(version))
    within_step = any(_steps(optimizer, module) for optimizer in _running)
    turn.changes += version != turn.version and not within_step
    turn.version = version
    if turn.state == "begun":
        # no step was seen: the first one isn't finished, as in SAM, or no optimizer makes any
        turn.state = "taken" if has_optimizer(module) else "each call"
    if turn.changes > 1:
        # after two changes SAM would have stepped: an optimizer without hooks makes them
        turn.state = "each call"
    took, turn.state = turn.state, {"new": "begun", "due": "taken"}.get(turn.state, turn.state)
    return took != "taken" or not any(p.requires_grad for p in module.parameters())


def awaits_step(module: nn.Module) -> bool:
    """Return whether an optimizer of torch's is to update a module, but hasn't since its call."""
    return module in _turns and _turns[module].state == "taken"


def turn_of(module: nn.Module) -> Any:
    """Return where a module stands, for :func:`set_turn`."""
    return replace(_turns[module]) if module in _turns else None


def set_turn(module: nn.Module, turn: Any) -> None:
    """Put a module back to where it stood."""
    forget_turns(module)
    if turn is not None:
        _turns[module] = turn


def forget_turns(module: nn.Module) -> None:
    """Start anew, as with other weights."""
    _turns.pop(module, None)


def has_optimizer(module: nn.Module) -> bool:
    """Return whether one of torch's optimizers has parameters of a module."""
    return any(_steps(x, module) for x in gc.get_objects() if issubclass(type(x), Optimizer))


def version_of(parameters: Iterable[Tensor]) -> int:
    """Give a number that grows with each change of some parameters."""
    return sum(parameter._version for parameter in parameters)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _note_start(optimizer: Optimizer, *_: Any) -> None:
    _running.add(optimizer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _note_step(optimizer: Optimizer, *_: Any) -> None:
    _running.discard(optimizer)
    for module, turn in list(_turns.items()):
        if _steps(optimizer, module):
            turn.state, turn.changes, turn.version = "due", 0, version_of(module.parameters())


def _steps(optimizer: Optimizer, module: nn.Module) -> bool:
    groups, ours = getattr(optimizer, "param_groups", ()), {id(p) for p in module.parameters()}
    return any(id(p) in ours for group in groups for p in group["params"])
