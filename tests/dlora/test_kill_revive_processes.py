"""Kill-and-Revive in two gloo processes: the same choices in both, and nothing sent for what is killed."""

import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from d2ft_peft import KillReviveCallback
from d2ft_peft.dlora import KillRevive
from tests.distributed.launch import run
from tests.dlora.kill_revive_methods import adapt, lora
from tests.models import TINY
from tests.test_trainer import arguments, doubles, samples


pytestmark = pytest.mark.distributed

STEPS = 8
CASES = {
    "probe": {"interval": 2, "idle": "probe"},
    "last": {"interval": 2, "idle": "last", "warmup": 1},
    "redrawn": {"interval": 1, "choose": "redrawn"},
}


def prepared():
    model = adapt(lora(init_lora_weights="gaussian")).double()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def part(batch, rank, size):
    return {key: value[rank::size] for key, value in batch.items()}


def train(model, optimizer, kill_revive, rank=0, size=1, steps=range(STEPS)):
    for step in steps:
        model(**part(TINY["llama"].batch(4, seed=step), rank, size)).loss.backward()
        optimizer.step()
        kill_revive.step()
        optimizer.zero_grad()


def in_two_processes(case: str, variant: str) -> dict[str, torch.Tensor]:
    """Weights, activity and bytes that were reduced in each step."""
    dist.init_process_group("gloo")
    model, optimizer = prepared()
    options = {option: option == variant for option in ("static_graph", "gradient_as_bucket_view")}
    ddp = DistributedDataParallel(model, **options)
    sent = []

    def count(state, bucket):
        sent[-1] += bucket.buffer().numel()
        flat = bucket.buffer().div_(2)
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, count)
    kill_revive = KillRevive(ddp, optimizer, active=2, **CASES[case])
    trainable = []
    for step in range(STEPS):
        sent.append(0)
        trainable.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        train(ddp, optimizer, kill_revive, dist.get_rank(), 2, [step])
    activity = torch.from_numpy(kill_revive.activity[0])
    kill_revive.close()
    sent.append(0)
    ddp(**part(TINY["llama"].batch(4, seed=99), dist.get_rank(), 2)).loss.backward()
    trainable.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    complete = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    dist.destroy_process_group()
    return {
        **weights(model), "activity": activity, "sent": torch.tensor(sent), "trainable": torch.tensor(trainable),
        "complete": torch.tensor(complete),
    }  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "variant"), [("probe", ""), ("last", "gradient_as_bucket_view"), ("redrawn", "static_graph")]
)
def test_two_processes_choose_alike_equal_one_and_send_only_what_trains(tmp_path, case, variant):
    model, optimizer = prepared()
    kill_revive = KillRevive(model, optimizer, active=2, **CASES[case])
    train(model, optimizer, kill_revive)
    first, second = run(__name__, "in_two_processes", tmp_path, case, variant)
    for name, value in weights(model).items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
        if case != "probe":  # which reads the mean of two norms, and not the norm of a mean
            torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert case == "probe" or (first["activity"].numpy() == kill_revive.activity[0]).all()
    assert np.abs(np.diff(first["activity"].int(), axis=0)).sum() > 0  # something was swapped
    assert first["sent"].tolist() == first["trainable"].tolist()
    assert first["sent"][1:-1].max() < first["sent"][-1] / 3 and first["complete"]  # all modules again at the end


def by_the_trainer(batch_size: str, resume: str = "") -> dict[str, torch.Tensor]:
    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return None

        def training_step(self, model, *args, **kwargs):
            if isinstance(model, DistributedDataParallel):
                assert not model.find_unused_parameters
            return super().training_step(model, *args, **kwargs)

    config = lora(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights="gaussian")
    model = adapt(config, "vit").double()
    callback = KillReviveCallback(active=2, interval=2, idle="last")
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            resume or folder, per_device_train_batch_size=int(batch_size), max_grad_norm=1.0, max_steps=7,
            learning_rate=0.05, save_strategy="steps" if resume else "no", save_steps=3,
            ddp_find_unused_parameters=False,
        )  # fmt: skip
        trainer = InOrder(model=model, args=args, train_dataset=doubles(samples(n=32)), callbacks=[callback])
        trainer.train()
        if resume:
            model = adapt(config, "vit").double()
            trainer = InOrder(model=model, args=args, train_dataset=doubles(samples(n=32)), callbacks=[callback])
            trainer.train(resume_from_checkpoint=f"{resume}/checkpoint-3")
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.thorough
def test_the_trainer_in_two_processes_equals_one_also_resumed(tmp_path):
    single = by_the_trainer("4")
    first, second = run(__name__, "by_the_trainer", tmp_path, "2", str(tmp_path / "resumed"))
    for name, value in single.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-9, msg=name)
