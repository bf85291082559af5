"""The package's annotations are good enough for strictly typed code that uses it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_users_code_passes_mypy_strictly(tmp_path):
    pytest.importorskip("mypy", reason='mypy is not installed; pip install ".[release]"')
    package = HERE.parents[1] / "d2ft_peft"
    # From elsewhere, so that the package is what is installed, and its own lines are not judged.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "MYPYPATH": str(package.parent)}
    checked = subprocess.run(
        [*command, str(HERE / "user_code.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert (package / "py.typed").is_file()
