"""The package's rooms import downwards only, as docs/contributing.md says, and that page names what exists."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "d2ft_peft"
PAGE = (ROOT / "docs" / "contributing.md").read_text()
FLOORS = {
    room: int(floor)
    for floor, rooms in re.findall(r"^\| (\d+) \| (.+?) \|", PAGE, re.MULTILINE)
    for room in re.findall(r"`(\w+)`", rooms)
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str | None:
    """The room that a module is in; None for the package's own `__init__`, which exports and stands above all."""
    return None if parts in ((), ("__init__",)) else parts[0]


def imported(path: Path) -> set[str]:
    """Rooms that a module imports from, within functions and for annotations as well."""
    rooms, here = set(), path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = here[: len(here) - (node.level - 1)]
                targets = [(*base, *module)] if base or module else [(alias.name,) for alias in node.names]
            elif module[0] == "d2ft_peft":
                targets = [module[1:]] if module[1:] else [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.Import):
            named = [tuple(alias.name.split(".")) for alias in node.names]
            targets = [name[1:] for name in named if name[0] == "d2ft_peft"]
        rooms |= {room_of(target) for target in targets}
    return rooms


def upwards(path: Path) -> list[str]:
    """Rooms that a module imports from and must not."""
    own = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    if own is None:
        return []
    below = {room for room, floor in FLOORS.items() if floor < FLOORS[own]}
    return sorted(str(room) for room in imported(path) - below - {own})


def test_imports_go_down():
    found = {str(path.relative_to(PACKAGE)): upwards(path) for path in MODULES}
    assert len(found) > 50 and {name: rooms for name, rooms in found.items() if rooms} == {}


def test_every_room_is_on_one_floor():
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    rooms |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(FLOORS) == rooms
    listed = Counter(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| \d+ \| (.+?) \|", PAGE, re.MULTILINE))))
    assert set(listed.values()) == {1}


def test_no_module_name_is_there_twice():
    counts = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert [name for name, count in counts.items() if count > 1] == []


def test_what_the_page_names_exists():
    paths = re.findall(r"`((?:d2ft_peft|tests|docs|examples|\.ci)/[\w./]*|setup\.cfg|\.ci/run)`", PAGE)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    code = "\n".join(path.read_text() for path in [*MODULES, *(ROOT / "tests").rglob("*.py")])
    names = set(re.findall(r"`([A-Z_]\w+|register_\w+)`", PAGE))
    assert names and [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize(
    ("room", "code", "found"),
    [
        ("schedule", "from ..engine import Plan", ["engine"]),
        ("schedule", "from ..partition import Partition", ["partition"]),
        ("schedule", "def f():\n    from d2ft_peft.planning.facts import facts_of", ["planning"]),
        ("engine", "import d2ft_peft.costs.flops", ["costs"]),
        ("engine", "from .. import scores", ["scores"]),
        ("engine", "from d2ft_peft import D2FTConfig", ["D2FTConfig"]),
        ("planning", "import numpy\nfrom ..schedule import Schedule\nfrom .facts import take_facts", []),
    ],
)
def test_the_check_itself(tmp_path, monkeypatch, room, code, found):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / room).mkdir()
    (tmp_path / room / "module.py").write_text(code)
    assert upwards(tmp_path / room / "module.py") == found
