"""What stands in the README and in docs/: code, commands, links and sentences."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.running import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]


def text_of(name: str) -> str:
    """A page of docs/, by its name."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def blocks(text: str, *languages: str) -> list[str]:
    """The blocks of code in one of some languages, in their order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def commands(text: str) -> list[str]:
    """The commands in blocks of shell, without comments, each part of ``a && b`` by itself."""
    lines = "\n".join(blocks(text, "bash")).splitlines()
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split(" && ")]
    return [part.strip() for part in parts if part.strip()]


def links(text: str) -> list[str]:
    """Where links and pictures lead to."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as the site and Git hosts name them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s", "-", word) for word in words}


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose, lists, tables and pictures; code in a line is one word."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^:::.*(\n    .*)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("**", "")
    pieces: list[str] = []
    for line in text.splitlines():
        cells = line.strip().strip("|").split("|") if line.startswith("|") else [line]
        begins = line.startswith("|") or re.match(r"\s*([-*#]|\d+\.)\s|\s*$", line)
        if begins or not pieces:
            pieces += [re.sub(r"^\s*([-*#]+|\d+\.)\s", "", cell) for cell in cells]
        else:
            pieces[-1] += f" {line.strip()}"
    ends = r"(?<=[.!?])[\")]*\s+(?=[A-Z(\"0-9]|code)"
    return [sentence for piece in pieces for sentence in re.split(ends, piece) if words(sentence)]


def words(sentence: str) -> int:
    """How many words a sentence has."""
    return len(re.findall(r"[\w'’.,%°×/+-]*\w[\w'’.,%°×/+-]*", sentence))
