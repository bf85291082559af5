"""Run the tests of LoRA on quantized weights, with the packages of the extra `quantized`.

    .venv/bin/python .ci/quantized.py

An environment on top of the one that this runs in, as for the contract tests: with these packages there, every process
that imports transformers takes seconds longer. Where they are absent the tests skip; here one that skips is a failure.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from contract import ROOT, environment
from package import extras


TESTS = ("tests/tuners/test_quantized.py", "tests/tuners/test_quantized_heads.py")
# Imported by transformers with the package: hqq's compiled functions.
IMPORTING_HQQ = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"


def main() -> int:
    python = environment(ROOT / ".venv-quantized", extras("quantized"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", IMPORTING_HQQ, f"--junitxml={report}"]
        command += ["-m", "thorough or not thorough", *TESTS]
        failed = subprocess.run(command, cwd=ROOT).returncode
        skipped = sum(int(suite.get("skipped", 0)) for suite in ElementTree.parse(report).iter("testsuite"))
    if skipped:
        print(f"{skipped} tests skipped, though their packages were installed")
    return int(bool(failed or skipped))


if __name__ == "__main__":
    sys.exit(main())
