"""What a ReconAux saves next to its weights, and with which other options it may go on."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

TERMS = ("registration", "statistics", "edges")
"""The weighted terms next to the reconstruction."""

# what a decoder may be trained on with, whatever it was saved with
_MAY_DIFFER = {"weight", "reconstruct", "loss", "structure"}

_WHOLE = {"feature_dim", "equivariant_dim", "target_size", "patch_size", "image_channels", "seed"}
_WHOLE |= {"decoder_dim", "decoder_depth", "decoder_heads", "decoder_tokens"}


def plain(name: str, value: Any) -> Any:
    """Make a number of Python's from one of numpy's.

    Raises:
        TypeError: if the option is to be a whole number and isn't.

    Example:
        >>> plain("weight", torch.tensor(2.0))
        2.0
    """
    value = value.item() if hasattr(value, "item") else value
    if name in _WHOLE and value is not None and not isinstance(value, int):
        raise TypeError(f"expected {name}= as a whole number, got {value!r}")
    return value


def pack(state: dict[str, Any]) -> Tensor:
    """Give plain values as bytes in a tensor: not all that reads a ``state_dict`` takes others.

    The number of calls is as wide as any, so that the average of two checkpoints can be read.

    Example:
        >>> early, late = (pack({"calls": calls, "seed": 1}) for calls in (9, 10))
        >>> unpack(late)
        {'calls': 10, 'seed': 1}
        >>> unpack((early.float() + late) / 2)["seed"]
        1
    """
    state = {**state, "calls": f"{state['calls']:012d}"}
    if "weight" in state:
        state["weight"] = "due" if state["weight"] == "due" else f"{state['weight']:.6e}"
    return torch.tensor(list(json.dumps(state).ljust(1024).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> dict[str, Any] | None:
    """Give back what was packed; None if it was averaged with what was packed elsewhere."""
    try:
        # an average may be a hair off
        state: dict[str, Any] = json.loads(bytes(packed.float().round().to(torch.uint8).tolist()))
        return {**state, "calls": int(state["calls"])}
    except ValueError:
        return None


def weight_of(state: dict[str, Any]) -> float | None:
    """Give the weight that a model was trained with; None if it was yet to be set, or unreadable.

    Example:
        >>> state = {"calls": 9, "options": {"weight": "auto"}}
        >>> [weight_of(unpack(pack({**state, "weight": w}))) for w in (0.25, "due")]
        [0.25, None]
        >>> weight_of({"options": {"weight": 2.0}})
        2.0
    """
    weight = state["options"]["weight"]
    try:
        return float(state["weight"] if weight == "auto" else weight)
    except ValueError:
        return None


def differences(state: dict[str, Any] | None, options: dict[str, Any]) -> tuple[str, bool]:
    """Name the options that are not as saved, and say if a decoder can't be trained on with them.

    Args:
        state: what was saved, if anything was that can be read.
        options: of the module that loads it.

    Returns:
        The differing options with both values, and whether one of them makes it another decoder.

    Example:
        >>> was = {"weight": 1.0, "edges": 16.0, "registration": 4.0, "statistics": 8.0}
        >>> differences({"options": was}, {**was, "weight": 2.0})
        ('weight=1.0, not 2.0', False)
        >>> differences({"options": was}, {**was, "edges": 0})
        ('edges=16.0, not 0', True)
    """
    was: dict[str, Any] = state["options"] if state else {}
    differing = [key for key, value in was.items() if options.get(key) != value]
    told = ", ".join(f"{key}={was[key]!r}, not {options.get(key)!r}" for key in differing)
    # a term that is there may get another weight
    changed = {key for key in TERMS if was.get(key) and options[key]}
    return told, not set(differing) <= _MAY_DIFFER | changed
