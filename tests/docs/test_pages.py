"""Pages are reached, their links lead somewhere on the forge as on the site, and messages that they quote are real."""

import ast
import re
from pathlib import Path

import pytest

from .pages import DOCS, PAGES, ROOT, name_of


FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
# A page's own code and data, what its text says of them aside.
TEXTS = {page: FENCED.sub("", page.read_text()) for page in PAGES}
SETTINGS = (ROOT / "mkdocs.yml").read_text()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and Python-Markdown both make them."""
    found, headings = set(), re.findall(r"^#+ (.+)$", TEXTS[page], re.MULTILINE)
    for heading in headings:
        text = re.sub(r"[`*]|\]\([^)]*\)", "", heading).lower()
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text).strip()))
    return found


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) if not re.match(r"https?:|mailto:", link)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link} has no such heading"
        # The site holds the pages alone: what is elsewhere in the repository has no address there.
        assert page.parent == ROOT or target.is_relative_to(DOCS), f"{link} leaves the site"


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"([\w/]+\.md)$", SETTINGS, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.parent != ROOT)


def test_the_reference_names_what_exists_and_all_that_the_package_exports():
    import d2ft_peft

    named = re.findall(r"^::: d2ft_peft\.([\w.]+)$", "".join(TEXTS.values()), re.MULTILINE)
    for name in named:
        module, _, attribute = f"d2ft_peft.{name}".rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
    assert {name.rpartition(".")[2] for name in named} >= set(d2ft_peft.__all__) - {"__version__"}


def strings(node: ast.AST) -> str:
    """A string of the code as it would be printed, with a line for each of its own values."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(strings(value) if isinstance(value, ast.Constant) else "\n" for value in node.values)
    return strings(node.left) + strings(node.right) if isinstance(node, ast.BinOp) else "\n"


def said() -> list[str]:
    """All strings of the package, those that are added up as well."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "d2ft_peft").rglob("*.py")]
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return [strings(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def quoted() -> list[str]:
    """Messages in the first column of the troubleshooting page."""
    rows = re.findall(r"^\| (.+?) \|", TEXTS[DOCS / "troubleshooting.md"], re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]*\w \w[^`]*)`", row) if "KeyError" not in message]


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    everything, messages = said(), quoted()
    assert len(messages) > 40
    for message in messages:
        parts = message.split("...")
        assert any(all(part in text for part in parts) for text in everything), message
