"""The measurement of the pair check: a small version."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_examples import pictures

from benchmarks.pair_check import main, table
from benchmarks.records import kept
from helpers.running import call_example, rows

OPTIONS = ["--transforms", "DINO", "probed", "--image-size", "16", "--runs", "5"]
OPTIONS += ["--wrong-runs", "5"]


def test_false_alarms_and_catches_are_measured(tmp_path: Path) -> None:
    pictures(tmp_path / "some", ("train", "test"), classes=2, count=40)
    out = tmp_path / "out"
    data = ["--data", f"some={tmp_path / 'some'}", "--out", out]
    printed = call_example(main, *data, *OPTIONS, "--batch-sizes", "8", "40")
    (run,) = kept(out)
    found = run["results"]
    assert {name: list(sizes) for name, sizes in found.items()} == {
        "DINO": ["8", "40"],
        "probed": ["8", "40"],
    }
    for sizes in found.values():
        for batch_size, kinds in sizes.items():
            assert kinds["paired"]["reported"] == 0
            for kind in ("shifted", "interleaved", "other images"):
                assert kinds[kind]["reported"] >= 4
            for kind in kinds.values():
                assert sum(kind["steps"].values()) == kind["runs"] == 5
                # a look needs 32 rows
                assert min(map(int, kind["steps"])) * int(batch_size) >= 32
    assert rows((out / "table.md").read_text()) == rows(table([run]))
    shown = rows(printed)
    assert [row[:4] for row in shown[1:]] == [
        ["some, 16 px", "DINO", "8", "0 of 5"],
        ["some, 16 px", "DINO", "40", "0 of 5"],
        ["some, 16 px", "probed", "8", "0 of 5"],
        ["some, 16 px", "probed", "40", "0 of 5"],
    ]


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, ("train", "test"), classes=2, count=4)
    with pytest.raises(SystemExit, match="found 8"):
        call_example(main, "--data", f"some={tmp_path}", "--batch-sizes", "5")
