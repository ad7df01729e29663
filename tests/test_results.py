"""What the README and the tables say was measured is what the runs' records say."""

from __future__ import annotations

from pathlib import Path

import compare
import natural_images
import pytest
from records import kept
from training import rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"
README = (ROOT / "README.md").read_text()


def made_of(folder: Path) -> str:
    """Make a folder's table anew."""
    make = natural_images.tables if folder.name.startswith("natural") else compare.table
    return make(kept(folder))


@pytest.mark.parametrize(
    "folder", [p for p in RESULTS.iterdir() if p.is_dir()], ids=lambda p: p.name
)
def test_tables_are_made_of_the_records(folder: Path) -> None:
    assert rows((folder / "table.md").read_text()) == rows(made_of(folder))


@pytest.mark.parametrize(
    ("before", "folder"),
    [
        ("CIFAR-10:\n", "natural"),
        ("50 classes of Tiny ImageNet:\n", "natural"),
        ("(examples/views3d/objects.jpg)", "views3d"),
    ],
)
def test_the_readmes_tables_are_those_of_the_records(before: str, folder: str) -> None:
    text = README.split(before)[1]
    shown = rows(text[: text.index("\n\n", text.index("| encoder"))])
    known = rows(made_of(RESULTS / folder))
    assert len(shown) > 5
    assert all(row in known for row in shown)
