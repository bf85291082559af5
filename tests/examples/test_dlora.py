"""The DLoRA example runs through, and a cloud that is killed in the middle changes nothing."""

import pytest
from peft import PeftConfig

from d2ft_peft.dlora import BaseModel, Cloud


class CloudHere:
    """Stands in for the example's cloud: in this process, which need not import everything anew."""

    def __init__(self, base):
        self.base, self.port = base, 0
        self.start()

    def start(self):
        self.cloud = Cloud(BaseModel.load(self.base))
        self.port = self.cloud.start(self.port)

    def kill(self):
        self.cloud.stop()


def run(folder, *more):
    from examples import dlora

    quick = ["--pre-training-steps", "2", "--steps", "20", "--folder", str(folder)]
    return dlora.main([*quick, *more])


@pytest.fixture
def example(monkeypatch):
    from examples import dlora

    monkeypatch.setattr(dlora, "LENGTH", 16)
    return dlora


@pytest.mark.thorough
def test_a_cloud_that_is_killed_and_started_again_changes_nothing(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "LocalCloud", CloudHere)
    undisturbed = run(tmp_path)
    disturbed = run(tmp_path, "--restart", "7")
    assert disturbed["losses"] == undisturbed["losses"] and len(undisturbed["losses"]) == 2
    assert disturbed["after"] == undisturbed["after"] < undisturbed["before"]
    assert undisturbed["stock"] == pytest.approx(undisturbed["after"], abs=1e-5)
    printed = capsys.readouterr().out
    assert "0 attempts in vain" in printed and "held-out loss:" in printed
    assert PeftConfig.from_pretrained(tmp_path / "adapter").peft_type.value == "LORA"
    assert (tmp_path / "adapter" / "kill_revive.png").stat().st_size > 1000


@pytest.mark.slow
def test_with_a_cloud_in_a_process_of_its_own(example, tmp_path):
    losses = run(tmp_path)["losses"]
    assert run(tmp_path, "--restart", "7")["losses"] == losses


def test_a_server_needs_its_base(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--server", "localhost:1"])
    assert "--server needs the --base" in capsys.readouterr().err
