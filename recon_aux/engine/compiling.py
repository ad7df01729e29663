"""Work beside torch.compile: what is done around a step stays out of compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """Keep a function, and what it calls, out of compiled code."""
    kept: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept


def around_compiled(function: Function) -> Function:
    """Keep a function out of compiled code, but not what it calls."""
    kept: Function = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return kept


@not_compiled
def run_eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function without compiling it, or anything in it.

    Compiled code is one node of the autograd graph. Nothing inside it can be checked.
    """
    with torch.compiler.set_stance("force_eager"):
        return function(*args, **kwargs)


def is_recomputing() -> bool:
    """Whether activation checkpointing calls a module again, within a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
