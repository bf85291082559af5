"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
_FENCE = re.compile(r"^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: what follows the language on its first line, and its text."""

    info: str
    code: str


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language, in order."""
    found = _FENCE.finditer(page.read_text())
    return [Block(m["info"].strip(), m["code"]) for m in found if m["language"] == language]


def name_of(page: Path) -> str:
    """A page's path from the root."""
    return str(page.relative_to(ROOT))


def with_blocks(language: str) -> list[str]:
    """Names of the pages that have blocks in a language; the README has a test of its own."""
    return [name_of(page) for page in PAGES if page.parent != ROOT and blocks(page, language)]
