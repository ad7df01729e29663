"""Checks of options. Each check, with its message, is written here once."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Turn a number of numpy or torch into one of Python. Leave anything else as it is."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, ValueError):
        # an array of several numbers has no item()
        return value


def finite_number(name: str, value: Any) -> float:
    """Turn a finite real number of Python, numpy or torch into a float, or raise a TypeError."""
    number = plain(value)
    if not isinstance(number, Real) or not math.isfinite(number):
        raise TypeError(f"expected {name} as a finite number, got {value!r}; pass a float")
    return float(number)


def check_nonnegative(name: str, value: Any) -> None:
    """Raise a ValueError unless an option is a finite number of 0 or more.

    Example:
        >>> check_nonnegative("weight", -1)
        Traceback (most recent call last):
        ...
        ValueError: expected weight= as a finite number of 0 or more, got -1. Pass such a number.
    """
    if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(
            f"expected {name}= as a finite number of 0 or more, got {value!r}. Pass such a number."
        )


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise a TypeError unless an option is a whole number, a ValueError if it is too small."""
    if not isinstance(value, Integral):
        raise TypeError(f"expected {name}= as a whole number, got {value!r}. Pass such a number.")
    if least is not None and int(value) < least:
        raise ValueError(f"expected {name}= of {least} or more, got {value}. Pass {least}, or more")


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise a ValueError unless an option is one of the known values."""
    if value not in known:
        raise ValueError(f"expected {name}= to be one of {known}, got {value!r}. Pass one of them.")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raise a ValueError unless one option divides another."""
    if whole % value:
        raise ValueError(
            f"expected a {name} that divides {whole_name}={whole}, got {value}. Pass one that does."
        )
