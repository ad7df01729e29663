"""A study: train and measure every arm with every seed, then put all records into one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.records import Record, file_name, keep, kept
from benchmarks.resuming import is_done, needs_no_training, refuse_mixed


def run_study(
    args: argparse.Namespace,
    runs: Iterable[dict[str, Any]],
    run: Callable[[dict[str, Any], Path], Record],
    *,
    table: Callable[[list[Record]], str],
    picture: Callable[[list[Record], Path], None],
) -> None:
    """Do the runs that aren't done, and make the table and the picture of all that are.

    Args:
        args: the command line's options; everything is kept in ``args.out``.
        runs: which runs there are, in their order: ``arm``, ``seed``, and ``data`` if there are
            several data sets.
        run: takes one of ``runs`` and the path of its record; trains, measures, gives the record.
        table: makes the text of ``table.md``.
        picture: draws ``table.png``.

    Raises:
        SystemExit: if records of other options are in the folder.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_mixed(args.out, args)
    for which in runs:
        path = args.out / f"{file_name(**which)}.json"
        if args.remeasure:
            if is_done(path, args) and needs_no_training(path):
                print(f"measuring {path.stem}")
                was = json.loads(path.read_text())
                again = run(which, path)
                # what isn't measured this time, as the transfer to data that isn't given, stays
                parts = again["results"].items()
                was["results"] = {part: was["results"].get(part, {}) | new for part, new in parts}
                # the rest says how it was trained
                made = ("options", "command", "commit", "machine", "threads", "torch")
                was["measured"] = {key: again[key] for key in made}
                keep(path, was)
            else:
                print(f"{path.stem} isn't done, or its checkpoint is gone: left as it is")
        elif not is_done(path, args):
            print(f"running {path.stem}")
            keep(path, run(which, path))
    done = kept(args.out)
    text = table(done)
    print(text)
    (args.out / "table.md").write_text(text)
    picture(done, args.out / "table.png")
    print(f"saved in {args.out}")
