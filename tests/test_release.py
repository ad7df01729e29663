"""What is released has one version, and its files agree on it."""

from __future__ import annotations

import re

import yaml

import recon_aux
from helpers.pages import text_of
from helpers.running import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", recon_aux.__version__)
    assert 'version = { attr = "recon_aux.__version__" }' in PROJECT
    assert 'dynamic = ["version"]' in PROJECT
    assert recon_aux.__version__ not in PROJECT


def test_the_core_needs_torch_and_einops_only() -> None:
    pattern = r'^dependencies = \["torch>=[\d.]+", "einops>=[\d.]+"\]$'
    assert re.search(pattern, PROJECT, re.MULTILINE)


def test_the_citation_is_of_this_version_and_of_the_methods_authors() -> None:
    assert CITATION["version"] == recon_aux.__version__
    assert CITATION["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    paper = CITATION["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    assert paper["title"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])


def test_the_changelog_has_what_isnt_released() -> None:
    headings = re.findall(r"^## (.*)$", text_of("CHANGELOG"), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].startswith(recon_aux.__version__)


def test_the_oldest_python_is_named_once() -> None:
    (oldest,) = re.findall(r'requires-python = ">=(.*)"', PROJECT)
    versions = re.findall(r"Python :: (3\.\d+)\"", PROJECT)
    assert versions[0] == oldest
    assert f"Python {oldest}" in (ROOT / "README.md").read_text()


def test_the_versions_that_pages_name_are_the_oldest_and_newest_that_sessions_run() -> None:
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', PROJECT))
    pythons = re.findall(r"Python :: (3\.\d+)\"", PROJECT)
    sessions = re.findall(
        r'@nox.session\(python="(.*)"\)\ndef (\w+)', (ROOT / "noxfile.py").read_text()
    )
    assert sessions == [(pythons[0], "oldest"), (pythons[-1], "newest")]
    for page in ((ROOT / "README.md").read_text(), text_of("index")):
        assert f"You need Python {pythons[0]} and torch {bounds['torch']}, or later" in page
    lightly, lightning = bounds["lightly"], bounds["lightning"]
    assert f"lightly ({lightly} or later, with Lightning {lightning} or later)" in text_of("index")
    assert lightning == bounds["pytorch-lightning"]
