"""Folders with a tiny model and tiny data, and the command line in process."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from d2ft_peft.cli import app

from ..models import TINY


@pytest.fixture
def d2ft():
    """Runs a command line; the answer as JSON if it asks for it, else as text."""

    def run(line: str, code: int = 0):
        result = CliRunner().invoke(app, shlex.split(line))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        if code:
            assert result.stdout == "" and "Traceback" not in result.stderr
            return result.stderr
        return json.loads(result.stdout) if "--json" in line else result.stdout

    return run


@pytest.fixture
def config_folder(tmp_path):
    """A folder with the configuration of a tiny model, and nothing else."""

    def make(name: str, **overrides) -> str:
        tiny, folder = TINY[name], tmp_path / name
        tiny.config(**{**tiny.kwargs, **overrides}, architectures=[tiny.model.__name__]).save_pretrained(folder)
        return str(folder)

    return make
