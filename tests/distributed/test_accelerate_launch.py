"""`accelerate launch` with a configuration file starts two processes on CPUs, and they train what one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import ROOT, free_port


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]
DDP = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_machines: 1
mixed_precision: 'no'
"""
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
num_machines: 1
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
"""
SCRIPT = """
import json
import os
import sys
import warnings

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from d2ft_peft import D2FTTrainer
from tests.test_trainer import adapt, arguments, doubles, samples

warnings.simplefilter("ignore")
folder, batch_size, as_if = sys.argv[1], int(sys.argv[2]), sys.argv[3]


class InOrder(D2FTTrainer):
    def _get_train_sampler(self, *args):
        return None


model = adapt("llama", "lora", policy="random", compute_budget=0.5)
args = arguments(folder, per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.5)
if as_if == "gpus":  # accelerate shards no parameters on CPUs; arguments have started the processes
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
trainer = InOrder(model=model, args=args, train_dataset=doubles(samples("llama", n=32)))
trainer.train()
trainer.save_model(folder)
if trainer.is_world_process_zero():
    kind = {name: type(p).__name__ for name, p in trainer.model.named_parameters()}
    facts = {"processes": trainer.args.world_size, "kind": trainer.accelerator.distributed_type, "type": kind}
    with open(f"{folder}/facts.json", "w") as file:
        json.dump(facts, file)
trainer.accelerator.wait_for_everyone()
os._exit(0)  # gloo's threads now and then abort an interpreter that ends, the stock Trainer's too
"""


def start(tmp_path: Path, name: str, *command: str, batch_size: int, as_if: str = "cpus"):
    """Run the script; what it saved, and how it ran."""
    script, folder = tmp_path / "train.py", tmp_path / name
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command, str(script), str(folder), str(batch_size), as_if],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "facts.json").read_text())


def launch(tmp_path: Path, name: str, configuration: str, **kwargs: str):
    file = tmp_path / f"{name}.yaml"
    file.write_text(configuration)
    command = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    return start(tmp_path, name, *command, "--main_process_port", str(free_port()), batch_size=2, **kwargs)


def test_two_processes_equal_one(tmp_path):
    alone, _ = start(tmp_path, "alone", batch_size=4)
    for name, configuration, as_if, kind, type_ in (
        ("ddp", DDP, "cpus", "MULTI_CPU", "Parameter"),
        ("fsdp", FSDP, "gpus", "FSDP", "DTensor"),
        ("on CPUs", FSDP, "cpus", "MULTI_CPU", "Parameter"),
    ):
        adapter, facts = launch(tmp_path, name, configuration, as_if=as_if)
        assert (facts["processes"], facts["kind"]) == (2, kind), name
        assert set(facts["type"].values()) == {type_}, name
        assert adapter.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(adapter[key], value, rtol=1e-7, atol=1e-9, msg=f"{name}: {key}")
