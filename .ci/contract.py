"""Run the contract tests with other versions of what the package builds on than those that the whole suite ran with.

    .venv/bin/python .ci/contract.py oldest     # the floors of setup.cfg
    .venv/bin/python .ci/contract.py newest     # whatever is released, also beyond the range of setup.cfg

An environment on top of the one that this runs in: it sees all packages of that one through a .pth file, and only those
that differ are installed into it, which takes seconds. So torch is the same everywhere: the CPU build that `.ci/run`
pins. (Its floor in setup.cfg, 2.11, is on PyPI as a CUDA build only, of several GB.) The newest versions that setup.cfg
admits are those of the whole suite, whose environment is made afresh.

What fails the gate: the oldest versions always; the newest where setup.cfg admits them. A newer release that it does
not admit is no fault of this commit, and no user gets it: it is a warning that cannot be overlooked, so that the
package is ready before the range is widened.
"""

import configparser
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
VARIED = ("transformers", "peft", "accelerate", "datasets")


def declared() -> dict[str, Requirement]:
    """The requirements of setup.cfg, of the packages whose versions are varied."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in requirements if requirement.name in VARIED}


def floor(requirement: Requirement) -> str:
    """The requirement of its oldest version."""
    (oldest,) = (s.version for s in requirement.specifier if s.operator == ">=")
    return f"{requirement.name}=={oldest}"


def environment(folder: Path, packages: list[str]) -> str:
    """An interpreter that finds `packages`, with what they need, before those of this interpreter."""
    venv.create(folder, clear=True, symlinks=True)
    python = str(folder / "bin" / "python")
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    parent = sysconfig.get_path("purelib")
    Path(site, "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    # Resolved together, so that what they need in other versions comes too; nothing of the parent is touched.
    subprocess.run([python, "-m", "pip", "install", "-q", "--upgrade", *packages], check=True)
    return python


def versions(python: str) -> dict[str, str]:
    """What an interpreter imports."""
    code = f"from importlib.metadata import version\nfor name in {VARIED!r}: print(version(name))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(VARIED, found, strict=True))


def main(which: str) -> int:
    requirements = declared()
    packages = [floor(requirement) if which == "oldest" else name for name, requirement in requirements.items()]
    python = environment(ROOT / f".venv-{which}", packages)
    found = versions(python)
    said = ", ".join(f"{name} {number}" for name, number in found.items())
    if not all(Requirement(package).specifier.contains(found[Requirement(package).name]) for package in packages):
        raise RuntimeError(f"asked for {', '.join(packages)}, and got {said}")
    if found == {name: version(name) for name in VARIED}:
        print(f"{which}: nothing else than what the whole suite ran with: {said}")
        return 0
    print(f"{which}: {said}", flush=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests/contract"]
    failed = subprocess.run(command, cwd=ROOT).returncode != 0
    beyond = [f"{name} {found[name]}" for name, r in requirements.items() if not r.specifier.contains(found[name])]
    if not beyond:
        return int(failed)
    verdict = "breaks the contract tests: prepare for it" if failed else "passes the contract tests: widen the range"
    print(f"{'!' * 120}\nWARNING: {', '.join(beyond)}, which setup.cfg does not admit, {verdict}\n{'!' * 120}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
