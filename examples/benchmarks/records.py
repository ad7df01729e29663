"""What a run leaves behind: numbers, with all that is needed to make them again."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.options import options_of

Record = dict[str, Any]
"""A run's record, as it is written to its JSON file."""


def record(
    args: argparse.Namespace, device: torch.device, seconds: float, results: Any, **which: Any
) -> Record:
    """Make a run's record: what it was, what it gave, and how, when and where.

    Args:
        args: the command line's options.
        device: what it was trained on.
        seconds: how long training took.
        results: plain numbers.
        which: of the runs this is.
    """
    return {
        **which,
        "results": results,
        "seconds": round(seconds),
        "options": options_of(args),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _COMMIT,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def file_name(arm: str, seed: int, data: str = "") -> str:
    """Name the file of a run's record, without its ending."""
    name = re.sub(r"[^\w.=]+", "-", arm) + f"-{seed}"
    return f"{data}-{name}" if data else name


def keep(path: Path, record: Record | list[Record]) -> None:
    """Write the record of a run that is done, or several."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1))
    # in one step, so that there is never half a record
    new.replace(path)


def kept(out: Path) -> list[Record]:
    """Read all records of a folder."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def results_of(runs: list[Record], arm: str) -> list[dict[str, Any]]:
    """Give an arm's results, one for each seed."""
    return [run["results"] for run in runs if run["arm"] == arm]


def by_data(runs: list[Record]) -> dict[str, list[Record]]:
    """Group records by the data set that was trained on; under "" if they don't say it."""
    names = dict.fromkeys(run.get("data", "") for run in runs)
    return {name: [run for run in runs if run.get("data", "") == name] for name in names}


def as_text(grid: Table) -> str:
    """Write a table as it is printed, whatever the terminal's width."""
    # wider than any table: rich would cut cells off
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()


def with_spread(values: list[float], digits: int) -> str:
    """Write the mean over seeds, with the standard deviation where there are several."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _processor() -> str:
    """Name the processor, where the system has its name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Name the commit that is checked out, with a + if files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(Path(__file__).parent)]
    found = [
        subprocess.run([*git, *command], capture_output=True, text=True, check=False).stdout
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
    ]
    return found[0].strip() + "+" * bool(found[1]) if found[0] else "unknown"


# read before hours of training, in which the checkout may change
_COMMIT = _commit()
