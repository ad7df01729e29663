"""Hooks of mkdocs: what pages link to outside docs/."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PATTERNS = ["results/**/*.md", "results/**/*.png", "results/*.json", "benchmarks/**/*.jpg"]
PATTERNS += ["*.py", "recipes/*.py"]


def on_files(files: Files, config: Any) -> Files:
    """Add records, pictures and examples to the site, under the names that they have here."""
    for path in sorted({path for one in PATTERNS for path in (ROOT / "examples").glob(one)}):
        name = path.relative_to(ROOT).as_posix()
        is_in_nav = name == "examples/results/README.md"
        level = InclusionLevel.INCLUDED if is_in_nav else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Follow links as in the repository, where the pages lie in docs/ beside examples/."""
    return markdown.replace("](../examples/", "](examples/").replace("](../../docs/", "](../../")
