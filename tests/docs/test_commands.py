"""Commands in the documentation name files that exist, and options that their scripts know."""

import dataclasses
import re
import shlex

import pytest
from transformers import TrainingArguments

from .pages import PAGES, ROOT, blocks, name_of


CLOUD = "d2ft_peft/dlora/cloud/__main__.py"
# Options that are made of the fields of a dataclass.
FIELDS = {
    "examples/image_classification.py": {field.name for field in dataclasses.fields(TrainingArguments)},
    "examples/causal_lm.py": {field.name for field in dataclasses.fields(TrainingArguments)},
}


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block: lines that end in a backslash go on, comments are left out."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").replace("; do", "\n").replace("done", "\n")
    return [words for line in lines.splitlines() if (words := shlex.split(line, comments=True))]


EVERY = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}")
    for page in PAGES
    for block in blocks(page, "bash")
    for words in commands(block.code)
]


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The script of this repository that a command runs, and its words; None if it runs something else."""
    for i, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[i + 1 :]
        if word.rpartition("/")[2] == "d2ft-cloud":
            return CLOUD, words[i + 1 :]
    return None


def known_options(script: str) -> str:
    """The text in which the options of a script stand: its own, and that of the modules beside it which it imports."""
    path = ROOT / script
    text = path.read_text()
    for name in re.findall(r"^from \.?([\w.]+) import", text, re.MULTILINE):
        beside = path.parent / f"{name.rpartition('.')[2]}.py"
        text += beside.read_text() if beside.is_file() else ""
    if script == CLOUD:
        text += (ROOT / "d2ft_peft/dlora/wire/protocol.py").read_text()
    return text


@pytest.mark.parametrize("words", EVERY)
def test_a_command_names_what_exists(words):
    for word in words:
        if re.match(r"(examples|docs|tests|d2ft_peft|\.ci)/", word):
            assert list(ROOT.glob(word)), f"{word} does not exist"
    if (found := script_of(words)) is None:
        return
    script, arguments = found
    text, fields = known_options(script), FIELDS.get(script, set())
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        name = option[2:].replace("-", "_")
        declared = f'"{option}"' in text or re.search(rf"^    {name}: ", text, re.MULTILINE) or name in fields
        assert declared, f"{script} has no option {option}"


def test_the_check_itself():
    (words,) = commands("python examples/quickstart.py \\\n    --no-such-option 3  # said why")
    with pytest.raises(AssertionError, match="no option --no-such-option"):
        test_a_command_names_what_exists(words)
    with pytest.raises(AssertionError, match="does not exist"):
        test_a_command_names_what_exists(["python", "examples/none.py"])
    assert len(EVERY) > 40
