"""Kill-and-Revive needs no grpc, and what does says so."""

import subprocess
import sys

import pytest


CODE = """
import sys
sys.modules["grpc"] = None
import d2ft_peft
from d2ft_peft import dlora
assert dlora.KillReviveCallback is d2ft_peft.KillReviveCallback
for name in dlora.__all__:
    try:
        getattr(dlora, name)
    except ImportError as error:
        assert "pip install" in str(error) and "d2ft_peft[dlora]" in str(error), error
        print(name)
"""


@pytest.mark.thorough
def test_what_talks_over_a_network_says_what_it_lacks():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["Certificates", "Cloud", "CloudError", "CloudProgressCallback", "Limits", "connect"]
