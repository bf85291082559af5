"""`d2ft edge` beside a cloud: trains what stock PEFT loads, and says in one line what is wrong."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from d2ft_peft.cli.task_data import load_task

from ..dlora.cases import serve


pytestmark = pytest.mark.filterwarnings(
    "ignore:the adapter's base model is the local path", "ignore:.*'pin_memory' argument is set as true"
)
CASES = {
    "a text": ("llama", "plain.txt", "", AutoModelForCausalLM),
    "few modules": ("llama", "pairs.jsonl", "--active 3 --interval 2 --packing bf16", AutoModelForCausalLM),
    "a head in the cloud": ("llama", "plain.txt", "--head cloud --target-modules q_proj", AutoModelForCausalLM),
    "texts with a label": ("bert", "reviews.csv", "", AutoModelForSequenceClassification),
    "texts, a decoder": ("llama", "reviews.csv", "--edge-blocks 1 0", AutoModelForSequenceClassification),
    "images": ("vit", "images", "--per_device_eval_batch_size 2", AutoModelForImageClassification),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_has_the_loss_that_was_said(d2ft, assets, tmp_path, case):
    name, data, options, model_class = CASES[case]
    base, data, out = str(assets / name), str(assets / data), tmp_path / "out"
    with serve(base, torch.float32) as (_, address):
        found = d2ft(
            f"edge {address} {base} {data} --output-dir {out} --r 4 --batch 4 --micro-batches 2 --max_steps 6 "
            f"--learning-rate 1e-2 --lr_scheduler_type constant --cache-dir {tmp_path / 'cache'} {options} --json"
        )
    metrics, traffic = found["metrics"], found["traffic"]
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert traffic["sent_bytes"] > 1000 and traffic["received_bytes"] > 1000 and traffic["replays"] == 0
    assert ("eval_accuracy" in metrics) == (model_class is not AutoModelForCausalLM)

    task = load_task(base, data, cache_dir=str(tmp_path / "cache"))
    options = {**task.options, "dtype": torch.float32}
    stock = PeftModel.from_pretrained(model_class.from_pretrained(base, **options), out).eval()
    with torch.no_grad():
        size = 2 if name == "vit" else 8  # as the Trainer has it, whose loss is a mean over samples of means of batches
        batches = [task.held_out.select(range(i, min(i + size, len(task.held_out)))) for i in
                   range(0, len(task.held_out), size)]  # fmt: skip
        losses = torch.stack([stock(**task.collate([part[i] for i in range(len(part))])).loss for part in batches])
    loss = losses @ torch.tensor([float(len(part)) for part in batches]) / len(task.held_out)
    # What crossed in bfloat16 was rounded.
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-2 if "bf16" in CASES[case][2] else 1e-5)


@pytest.mark.thorough
def test_a_cloud_and_an_edge_are_two_commands(d2ft, assets, tmp_path):
    command = [sys.executable, "-c", "from d2ft_peft.cli import main; main()", "cloud", str(assets / "llama")]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as cloud:
        try:
            port = cloud.stdout.readline().rpartition(":")[2].strip()
            said = d2ft(
                f"edge localhost:{port} {assets / 'llama'} {assets / 'plain.txt'} --output-dir {tmp_path / 'out'} "
                f"--max_steps 2 --cache-dir {tmp_path / 'cache'}"
            )
        finally:
            cloud.terminate()
    assert said.startswith("edge, causal-lm: loss ") and "round trips; saved in" in said


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", "gave no answer"),
        ("--tls", "gave no answer"),
        ("--active 0", "active=0 must be"),
        ("--packing zip", "packing='zip' must be one of"),
        ("--head nowhere", "head='nowhere' must be one of"),
        ("--target-modules nothing", "nothing"),
        ("--certificate own.pem", "belong together; give both"),
        ("--authority missing.pem", "missing.pem"),
        ("--token-file missing", "missing"),
        ("--edge-blocks 9 9", "edge_blocks"),
        ("--no_such_option 3", "is no option of d2ft edge"),
        ("--text-column body", "column 'body' is not in the data"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(d2ft, assets, tmp_path, options, says):
    error = d2ft(
        f"edge localhost:9 {assets / 'llama'} {assets / 'plain.txt'} --output-dir {tmp_path / 'out'} --patience 0.1 "
        f"--cache-dir {tmp_path / 'cache'} {options}",
        code=2,
    )
    assert says in error and error.startswith("d2ft: ") and error.count("\n") == 1
