"""Run scripts and examples to their end, and read the tables that they make."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_script(
    name: str, *arguments: Any, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run one of tests/helpers/scripts to its end, which a deadlock wouldn't come to."""
    return run_python(*launcher, ROOT / "tests" / "helpers" / "scripts" / name, *arguments)


def run_example(name: str, *arguments: Any) -> str:
    """Run one of the examples, which must succeed, and give what it prints."""
    result = run_python(ROOT / "examples" / name, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def call_example(main: Callable[[], None], *arguments: Any) -> str:
    """Run an example in this process, which spares its imports, and give what it prints."""
    path = Path(main.__code__.co_filename)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        main()
    return printed.getvalue()


def run_python(
    *command: Any, environment: dict[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python on one thread, without a GPU, with all of this process's paths."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
            **(environment or {}),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def render_objects(folder: Path) -> Path:
    """Render two objects of each class into a folder, four views of each, with masks."""
    options = ["--objects", "2", "--views", "4", "--size", "32", "--val", "0.5", "--workers", "2"]
    run_example("benchmarks/views3d/render.py", folder, *options)
    return folder


def fail_once(monkeypatch: pytest.MonkeyPatch, method: Any, at: int) -> list[int]:
    """Let a method's so-manyth training step fail; list the steps that are begun."""
    step = method.training_step
    begun: list[int] = []

    def training_step(model: Any, batch: Any, index: int) -> Any:
        begun.append(model.trainer.global_step)
        if len(begun) == at:
            raise OSError("the power went")
        return step(model, batch, index)

    monkeypatch.setattr(method, "training_step", training_step)
    return begun


def rows(text: str) -> list[list[str]]:
    """Give the cells of a text's tables, without the lines that part head and body."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if set("".join(row)) != {"-"}]
