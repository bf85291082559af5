"""Build the package as it would be released, try the wheel where nothing of the checkout is in sight, build the docs.

    .venv/bin/python .ci/package.py

The tools (extras `docs` and `release` of setup.cfg) are installed into an environment of their own on top of the one
that this runs in, and the wheel into another one, so that torch is downloaded once.
"""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from contract import environment


ROOT = Path(__file__).parents[1]
TRY = """
import sys
from importlib.metadata import requires
from pathlib import Path
import d2ft_peft
from d2ft_peft import D2FTConfig
where = Path(d2ft_peft.__file__)
assert Path(sys.prefix) in where.parents, f"{where} is not the installed wheel"
assert (where.parent / "py.typed").is_file() and D2FTConfig(compute_budget=0.5).policy == "exact_first"
assert any(line.startswith("torch") for line in requires("d2ft_peft"))
"""


def extras(*names: str) -> list[str]:
    """The requirements of extras of setup.cfg."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    return [line for name in names for line in config["options.extras_require"][name].split("\n") if line]


def run(*command: object, cwd: Path = ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(word) for word in command], cwd=cwd, env=environment, check=True)


def check_contents(sdist: Path, wheel: Path) -> None:
    """All modules of the package, its marker for types and its licence, and nothing else."""
    files = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "d2ft_peft").rglob("*.py")}
    missing = sorted((modules | {"d2ft_peft/py.typed"}) - set(files))
    foreign = [name for name in files if not name.startswith(("d2ft_peft/", "d2ft_peft-"))]
    if missing or foreign or not any(name.endswith("LICENSE") for name in files):
        raise SystemExit(f"{wheel.name} lacks {missing or 'nothing'} and holds {foreign or 'nothing'} besides.")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    if lacking := {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "d2ft_peft/py.typed"} - inside:
        raise SystemExit(f"{sdist.name} lacks {sorted(lacking)}.")


def main() -> None:
    tools = environment(ROOT / ".venv-tools", extras("docs", "release"))
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Path(folder)
        run(tools, "-m", "build", "--outdir", elsewhere)  # the wheel is built from the sdist
        (sdist,), (wheel,) = elsewhere.glob("*.tar.gz"), elsewhere.glob("*.whl")
        check_contents(sdist, wheel)
        run(tools, "-m", "twine", "check", "--strict", sdist, wheel)
        python = environment(ROOT / ".venv-wheel", ["--no-deps", "--ignore-installed", str(wheel)])
        run(python, "-c", TRY, cwd=elsewhere)
        run(Path(python).with_name("d2ft-cloud"), "--help", cwd=elsewhere)
        user_code = shutil.copy(ROOT / "tests/typing/user_code.py", elsewhere)  # there mypy sees the checkout's package
        run(tools, "-m", "mypy", "--strict", "--python-executable", python, user_code, cwd=elsewhere)
    run(tools, "-m", "mkdocs", "build", "--strict")


if __name__ == "__main__":
    sys.exit(main())
