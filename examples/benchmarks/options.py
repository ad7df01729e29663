"""The command line's options: those that studies share, written down, and compared with earlier."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

# options that say which runs there are and what computes them: runs that differ in these alone
# are comparable
_MAY_DIFFER = {"arms", "seeds", "out", "data", "folder", "lists", "photos", "images"}
_MAY_DIFFER |= {"remeasure", "protocols"}
_MAY_DIFFER |= {"workers", "no_cache", "device", "precision"}

# options that are younger than some records, and what those records were made with
_BEFORE = {"views": "probed", "optimizer": "AdamW", "validate": "0"}


def study_parser(
    description: str | None, *, arms: Sequence[str], out: str, batch_size: int, limit: str
) -> argparse.ArgumentParser:
    """Make a parser with the options that every study has.

    Args:
        description: of the study.
        arms: those that are compared if none are given.
        out: folder of the records if none is given.
        batch_size: if none is given.
        limit: what ``--limit`` does.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument
    add("--arms", nargs="+", default=arms, help="with options behind, after a comma")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--out", type=Path, default=Path(out))
    add("--limit", type=int, help=limit)
    add("--batch-size", type=int, default=batch_size)
    add("--lr", type=float, default=2e-3)
    add("--workers", type=int, default=0)
    add("--precision", default="32-true")
    add("--device", default="auto", help="auto, cpu, gpu: Lightning's accelerator")
    add(
        "--remeasure",
        action="store_true",
        help="measure what is done once more, from its checkpoint; train nothing",
    )
    return parser


def options_of(args: argparse.Namespace) -> dict[str, str]:
    """Write a command line's options as text."""
    return {name: str(value) for name, value in vars(args).items()}


def refuse_others(
    was: dict[str, str],
    args: argparse.Namespace,
    path: Path,
    *,
    may_differ: set[str] = _MAY_DIFFER,
) -> None:
    """Refuse to go on with what was made with other options.

    Args:
        was: :func:`options_of` when it was made.
        args: the options now.
        path: of what was made.
        may_differ: options that may differ.

    Raises:
        SystemExit: if another option differs.
    """
    was = {**_BEFORE, **was}
    differ = [
        f"--{name.replace('_', '-')} {was.get(name)}, not {value}"
        for name, value in options_of(args).items()
        if name not in may_differ and was.get(name) != value
    ]
    if differ:
        raise SystemExit(
            f"expected the options that {path} was made with: {', '.join(differ)}; "
            "other options need another folder"
        )


def note_options(folder: Path, args: argparse.Namespace) -> None:
    """Note the options in a folder that is about to be filled.

    Raises:
        SystemExit: if other options are noted there already.
    """
    noted = folder / "options.json"
    if noted.exists():
        # one run has one precision: the record has room for the last one only
        was = json.loads(noted.read_text())
        refuse_others(was, args, folder, may_differ=_MAY_DIFFER - {"precision"})
    folder.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(options_of(args)))
