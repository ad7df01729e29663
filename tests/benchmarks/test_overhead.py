"""The measurement of what attaching costs: a small version, and the figures that are counted."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import overhead
from helpers.running import call_example

SMALL = ["--models", "tiny ResNet-18, 32", "--device", "cpu", "--batch-size", "2"]
SMALL += ["--rounds", "1", "--steps", "1"]


def test_time_memory_and_flops_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a process of its own is for its peak of memory, which is only looked at here
    monkeypatch.setattr(overhead, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    call_example(overhead.main, *SMALL, "--methods", "BYOL", "--out", tmp_path)
    runs: list[dict[str, Any]] = json.loads((tmp_path / "overhead.json").read_text())
    (found,) = (run["results"] for run in runs)
    # what is added is there, and small
    assert 1 < found["FLOPs"] < 1.06
    assert found["same operations"]
    pairs = zip(found["bare operations"], found["attached operations"], strict=True)
    forward, backward = (attached - bare for bare, attached in pairs)
    # with few pairs the check of pairs takes its time
    assert 0 < backward <= 20 < forward <= 400
    assert [time["bare ms"] > 0 for time in found["time"].values()] == [True, True]
    assert min(found["bare MiB"], found["inference"]) > 0
    # their sum, and the eight that take longest
    operations = {key: count for key, (count, _) in found["added"].items()}
    assert len(operations) == 9
    assert operations["all"] > max(300, sum(operations.values()) / 2)
    text = (tmp_path / "table.md").read_text()
    assert "| tiny ResNet-18, 32, BYOL |" in text
    assert "ResNet-18, 32, BYOL adds operations (ms) a step: all " in text


def test_curves_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # times are looked at above
    monkeypatch.setattr(overhead, "step_time", lambda *_: {"ratio": 1.0})
    call_example(overhead.main, *SMALL, "--grow", "--small", "--out", tmp_path)
    curves = json.loads((tmp_path / "growth.json").read_text())["results"]
    assert len(curves) == 4
    assert all(1 < flops < 2 for ((_, _, flops),) in curves.values())
    assert (tmp_path / "growth.png").stat().st_size > 0
