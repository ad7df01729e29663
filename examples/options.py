"""Options: read from a call's text, written down, and compared with those of an earlier run."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

# which runs there are, and what computes them: runs that differ in these alone are comparable
_FREE = {"arms", "seeds", "out", "data", "folder", "lists"}
_FREE |= {"workers", "no_cache", "device", "precision"}

# options that are younger than some records, and what those were made with
_ONCE = {"views": "probed", "optimizer": "AdamW"}


def parse_options(options: str) -> dict[str, Any]:
    """Read attach's options as they are written in a call."""
    try:
        call = ast.parse(f"attach({options})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return {str(given.arg): ast.literal_eval(given.value) for given in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise SystemExit(f"expected options as name=value, ..., got {options!r}") from error


def options_of(args: argparse.Namespace) -> dict[str, str]:
    """Write a command line's options as text."""
    return {name: str(value) for name, value in vars(args).items()}


def refuse_others(
    was: dict[str, str], args: argparse.Namespace, path: Path, *, free: set[str] = _FREE
) -> None:
    """Refuse to go on with what was made with other options.

    Args:
        was: :func:`options_of` when it was made.
        args: the options now.
        path: of what was made.
        free: options that may differ.

    Raises:
        SystemExit: if an option differs that makes a difference, and by which.
    """
    was = {**_ONCE, **was}
    differ = [
        f"--{name.replace('_', '-')} {was.get(name)}, not {value}"
        for name, value in options_of(args).items()
        if name not in free and was.get(name) != value
    ]
    if differ:
        raise SystemExit(
            f"expected the options that {path} was made with: {', '.join(differ)}; "
            "other options need another folder"
        )


def go_on(folder: Path, args: argparse.Namespace) -> None:
    """Note the options in a folder that is about to be filled; refuse others than the noted."""
    noted = folder / "options.json"
    if noted.exists():
        # one run is of one precision, or its record would tell but the last
        was = json.loads(noted.read_text())
        refuse_others(was, args, folder, free=_FREE - {"precision"})
    folder.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(options_of(args)))
