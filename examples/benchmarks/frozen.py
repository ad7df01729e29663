"""Downstream tasks: encoders that a study has trained, frozen, and measured on something else.

A study, such as natural_images.py, leaves records and checkpoints in its folder. A downstream task
reads the encoders from there. It keeps its own records in a folder inside that one, so encoders of
different studies are never in one table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from pytorch_lightning import seed_everything
from torch import nn

from benchmarks.bars import draw_across
from benchmarks.encoders import build_encoder
from benchmarks.records import (
    Record,
    as_text,
    by_data,
    file_name,
    kept,
    record,
    results_of,
    with_spread,
)
from benchmarks.resuming import needs_no_training, trained_on
from benchmarks.study import run_study
from recon_aux.probe import markdown_table

Build = Callable[[dict[str, str]], nn.Module]
"""Makes an encoder from the options in a study's record."""


def task_parser(description: str | None, *, out: str) -> argparse.ArgumentParser:
    """Make a parser with the options that every downstream task has.

    Args:
        description: of the task.
        out: folder of the records if none is given, inside the study's folder.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="of the study: its records, with the checkpoints beside them")
    add("--arms", nargs="+", help="measure these alone, named as in the study's records")
    add("--out", type=Path, default=Path(out), help="folder of the records, inside the study's")
    add("--device", default="auto", help="auto, cpu, gpu: Lightning's accelerator")
    # run_study asks for it; here a deleted record is made again, in minutes
    parser.set_defaults(remeasure=False)
    return parser


def find_trained(folder: Path, study: str, arms: Sequence[str] | None = None) -> list[Record]:
    """Find a study's records whose encoders are still there.

    Args:
        folder: of the study's records.
        study: the script that made them.
        arms: those that are wanted; all if not given.

    Raises:
        SystemExit: if an arm has no record, or no encoder is left.
    """
    runs = [run for run in kept(folder) if run["command"].startswith(study)]
    known = {run["arm"] for run in runs}
    if runs and (unknown := set(arms or ()) - known):
        raise SystemExit(
            f"--arms expects any of {sorted(known)}, the arms in {folder}, got {sorted(unknown)}"
        )
    found = []
    for run in runs:
        if arms is None or run["arm"] in arms:
            name = file_name(**_which(run))
            if needs_no_training(folder / f"{name}.json"):
                found.append(run)
            else:
                print(f"{name} is left out: its checkpoint is gone")
    if not found:
        raise SystemExit(
            f"expected records of {study} with checkpoints beside them in {folder}, found none. "
            f"Pass the folder that was {study}'s --out."
        )
    return found


def load_encoder(path: Path, build: Build) -> nn.Module:
    """Load the encoder of a record, frozen.

    Args:
        path: of the record's file.
        build: makes the encoder from the record's options.
    """
    was = json.loads(path.read_text())
    # an arm that isn't trained has no checkpoint: its seed gives the weights again
    seed_everything(was["seed"], verbose=False)
    encoder = build(was["options"])
    checkpoint = path.with_suffix("") / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
        # lightly's masked transformers hold the encoder as "vit", beside a mask token
        found = {k.removeprefix("backbone.").removeprefix("vit."): v for k, v in state.items()}
        encoder.load_state_dict({k: found[k] for k in encoder.state_dict()})
    return encoder.eval().requires_grad_(False)


def measure_trained(
    args: argparse.Namespace,
    trained: Sequence[Record],
    measure: Callable[[nn.Module, Path], dict[str, float]],
    *,
    shown: str,
    nothing: str,
    build: Build = lambda made: build_encoder(made["backbone"]),
) -> None:
    """Measure every encoder that isn't measured yet; make the table and the picture.

    Args:
        args: the command line's options, of :func:`task_parser`.
        trained: records of the study, see :func:`find_trained`.
        measure: takes a frozen encoder on ``args.device`` and the path of its record; gives
            numbers, by their column in the table.
        shown: the column that the picture shows.
        nothing: the column of what needs no encoder, a line in the picture.
        build: makes an encoder from the options in a record of the study.
    """
    device = trained_on(args)
    args.out = args.folder / args.out

    def run(which: dict[str, Any], path: Path) -> Record:
        source = args.folder / path.name
        started = time.monotonic()
        results = measure(load_encoder(source, build).to(device), path)
        was = json.loads(source.read_text())
        made = {key: was[key] for key in ("options", "commit", "seconds")}
        return record(args, device, time.monotonic() - started, results, trained=made, **which)

    run_study(
        args,
        [_which(run) for run in trained],
        run,
        table=table,
        picture=lambda done, path: draw(done, shown, nothing, path),
    )


def table(done: list[Record]) -> str:
    """Put the encoders side by side: mean and standard deviation over seeds.

    Example:
        >>> runs = [{"arm": "SimCLR", "seed": 0, "results": {"error, px": 5.5}}]
        >>> "SimCLR" in table(runs) and "5.50" in table(runs)
        True
    """
    text = []
    for data, runs in by_data(done).items():
        columns = list(runs[0]["results"])
        grid = markdown_table(["seeds", *columns])
        for arm in dict.fromkeys(run["arm"] for run in runs):
            found = results_of(runs, arm)
            cells = [with_spread([each[key] for each in found], 2) for key in columns]
            grid.add_row(arm, str(len(found)), *cells)
        text += [f"trained on {data}"] * bool(data) + [as_text(grid)]
    return "\n".join(text)


def draw(done: list[Record], shown: str, nothing: str, path: Path) -> None:
    """Save a picture: a bar for each arm, and a line for what needs no encoder."""
    groups = by_data(done)
    arms = list(dict.fromkeys(run["arm"] for run in done))
    size = 3.5 * len(groups) + 2, 0.3 * len(arms) + 1.2
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False, sharey=True)
    for axis, (data, runs) in zip(axes[0], groups.items(), strict=True):
        # an arm that another data set has leaves a gap
        draw_across(axis, {a: [found[shown] for found in results_of(runs, a)] for a in arms})
        axis.axvline(mean(run["results"][nothing] for run in runs), color="k", ls=":")
        axis.set(title=data, xlabel=f"{shown} (dotted: {nothing})")
    axes[0, 0].set_yticks(range(len(arms)), arms)
    # the first arm on top
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _which(run: Record) -> dict[str, Any]:
    """Say which of the study's runs a record is."""
    return {key: run[key] for key in ("data", "arm", "seed") if key in run}
