"""What the pages say is there, is there: links, promises, options, the site's navigation."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, VICRegLoss

from helpers.models import Siamese
from helpers.pages import DOCS, PAGES, anchors, links, sentences, text_of, words
from helpers.running import ROOT
from recon_aux import ReconAux, attach
from recon_aux.integrations import lightly

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

# --- how they are written ---


@pages
def test_sentences_are_short(page: Path) -> None:
    most = 25 if page.stem == "README" else 28
    assert [one for one in sentences(page.read_text()) if words(one) > most] == []


def test_long_sentences_are_seen() -> None:
    text = """# One two

Three `four five` six
seven. Eight [nine](ten)?

- eleven. Twelve

| 13 | fourteen. Fifteen |
|---|---|
```
not counted
```
"""
    found = [words(one) for one in sentences(text)]
    assert found == [2, 4, 2, 1, 1, 1, 1, 1]


# --- where they lead ---


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_records_links_lead_somewhere() -> None:
    test_links_lead_somewhere(ROOT / "examples" / "results" / "README.md")


def test_links_and_anchors_are_read() -> None:
    assert links("[a](b.md#c) `[d](e)` ![f](g.png)\n```\n[h](i)\n```\n") == ["b.md#c", "g.png"]
    assert '`weight="auto"`' in text_of("choosing")
    assert {"weightauto", "if-training-goes-wrong"} <= anchors(ROOT / "docs" / "choosing.md")


def named_in(navigation: object) -> list[str]:
    """The pages of mkdocs' navigation, at any depth."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    assert not isinstance(parts, (str, int))
    return [name for part in parts for name in named_in(part)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text())
    named = [name for name in named_in(site["nav"]) if "/" not in name]
    assert sorted(named) == sorted(page.name for page in DOCS)


# --- what they promise ---

PROMISES = [line for line in text_of("guarantees").splitlines() if line.startswith("- ")]
NAMED = sorted({one for line in PROMISES for one in re.findall(r"`(test_\w+[^`]*)`", line)})


def test_each_promise_names_its_test() -> None:
    assert len(PROMISES) == 17
    assert all(re.match(r"- \*\*[^*]+\*\* \(`test_\w+", line) for line in PROMISES)


def test_the_promised_tests_are_there() -> None:
    files = {name.split(" ")[0] for name in NAMED}
    paths = [path for path in (ROOT / "tests").rglob("test_*.py") if path.stem in files]
    assert len(paths) == len(files)
    collected = [
        (path.stem, name)
        for path in paths
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    for named in NAMED:
        file, _, words_in_it = named.partition(" -k ")
        chosen = words_in_it.strip('"').split(" or ")
        assert all(
            any(one == file and word in name for one, name in collected) for word in chosen
        ), named


# --- the options ---

OPTIONS = text_of("options")


def rows_of_options() -> list[tuple[str, str]]:
    return re.findall(r"^\| (`.*?) \| (.*?) \|", OPTIONS, re.MULTILINE)


def test_every_option_is_in_the_page_and_nothing_else() -> None:
    listed = {name for row in rows_of_options() for name in re.findall(r"`(\w+)`", row[0])}
    taken = {*inspect.signature(ReconAux).parameters, *inspect.signature(attach).parameters}
    alone = {"model", "options", "backbone", "backbone_method", "heads", "image_size"}
    alone |= {"features", "views", "interleaved", "example_input", "log", "momentum_encoders"}
    alone |= {"step_method", "feature_dim", "spatial"}
    assert listed == taken - alone
    assert all(f"`{name}`" in OPTIONS for name in alone - {"model", "options"})


@pytest.mark.parametrize("page", ["options", "../README"])
def test_a_page_has_the_options_defaults(page: str) -> None:
    parameters = inspect.signature(ReconAux).parameters
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", text_of(page), re.MULTILINE)
    assert len(rows) >= 6
    for row in rows:
        # what is None by default is found elsewhere, which words say; and so is attach's weight
        skipped = {"weight"} if page != "options" else set()
        names = [name for name in re.findall(r"`(\w+)`", row[0]) if name not in skipped]
        for name in names:
            default = getattr(parameters.get(name), "default", None)
            if default is not None:
                text = f"{default:g}" if isinstance(default, float) else str(default)
                assert re.search(rf"(?<![\w.]){re.escape(text)}(?![\w.])", row[1]), name


def default_weights() -> list[str]:
    weights = []
    for loss in (NTXentLoss(), VICRegLoss(), NegativeCosineSimilarity()):
        model = Siamese()
        model.criterion = loss
        weights.append(f"{lightly.attach(model).recon_aux.options['weight']:g}")
    return weights


def test_the_default_weights_are_the_pages() -> None:
    table = text_of("choosing").split("| your loss")[1].splitlines()[2:5]
    assert [line.split("|")[2].strip() for line in table] == default_weights()
    for page in ("lightly", "your_own_loop"):
        told = re.search(
            r"(\S+) for NT-Xent, (\S+) for VICReg's loss, (\S+) for neg", text_of(page)
        )
        assert told is not None
        assert list(told.groups()) == default_weights(), page


def test_each_extra_is_in_the_page() -> None:
    project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^([\w-]+) = \[", project.split("[tool.setuptools")[0], re.MULTILINE)
    listed = re.findall(r"^\| `([\w-]+)` \|", text_of("index"), re.MULTILINE)
    assert sorted(listed) == sorted(extras)
