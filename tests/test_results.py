"""What the README and the tables say was measured is what the runs' records say."""

from __future__ import annotations

from itertools import takewhile
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


def first_table(text: str, after: str) -> list[list[str]]:
    """Read the first table of encoders after some words, which are in the text once."""
    (_, text) = text.split(after) if after else ("", text)
    lines = text[text.index("| encoder") :].splitlines()
    return rows("\n".join(takewhile(lambda line: line.startswith("|"), lines)))


@pytest.mark.parametrize(
    "folder", [p for p in RESULTS.iterdir() if p.is_dir()], ids=lambda p: p.name
)
def test_tables_are_made_of_the_records(folder: Path) -> None:
    assert rows((folder / "table.md").read_text()) == rows(made_of(folder))


@pytest.mark.parametrize(
    ("before", "folder", "title"),
    [
        ("\nCIFAR-10:\n", "natural", "CIFAR-10: the whole feature"),
        ("\n50 classes of Tiny ImageNet:\n", "natural", "Tiny-ImageNet-50: the whole feature"),
        ("(examples/views3d/objects.jpg)", "views3d", ""),
    ],
)
def test_the_readmes_tables_are_those_of_the_records(before: str, folder: str, title: str) -> None:
    shown = first_table(README, after=before)
    assert len(shown) > 5
    # all of them, in their order
    assert shown == first_table(made_of(RESULTS / folder), after=title)
