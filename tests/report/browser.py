"""A real browser without a screen, where one is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--window-size=1280,2600", "--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


def open_page(page: Path, profile: Path) -> str:
    """The document of a page as it is once its scripts have run, without what the scripts themselves say."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-2000:]
    return re.sub(r"<script.*?</script>", "", found.stdout, flags=re.DOTALL)
