"""D2FTTrainer with heads shared out over gloo processes: the weights, logs and predictions of one process, and resuming
on another number of them, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTTrainer, Operation, Schedule, register_policy
from d2ft_peft.head_parallel import HeadParallel
from d2ft_peft.head_parallel.storage.optimizer_state import OPTIMIZER_FILE
from d2ft_peft.schedule.policies import registry
from tests.distributed.head_parallel import Case, adapter_of, batches_of, model_of
from tests.distributed.launch import run
from tests.distributed.test_head_parallel_use import message
from tests.models import TINY
from tests.test_trainer import adapt, arguments, doubles, samples


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

# An epoch of seven micro-batches, the last one smaller: the second step is shorter, and training goes on into a third.
SAMPLES, STEPS, SAVED = 13, 4, 2
CASES = {
    "vit": ("vit", "full", {"train_boundary": True}, {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.5}),
    "llama": ("llama", "lora", {}, {"max_grad_norm": 0, "label_smoothing_factor": 0.1}),
    "bert": ("bert", "full", {"modules_to_save": ["classifier"]}, {"load_best_model_at_end": True}),
    # Dropout in the model, of which every rank draws its own, and noise in the data, of which all need the same.
    "noise": ("vit", "full", {}, {}),
    "fisher": ("vit", "lora", {"policy": "bilevel", "backward_score": "fisher", "num_full": 2}, {}),
}


ALIKE = ["vit", "llama", "bert"]  # cases in which one process does the same


def random_cells(problem):
    """Random operations that do not depend on devices; one micro-batch is not run at all."""
    operations = problem.rng.integers(0, 3, (problem.num_micro_batches, len(problem.blocks)))
    operations[problem.step % 2] = Operation.SHORTCUT
    operations[-1, 0] = Operation.FULL
    return Schedule(operations, problem.weights, blocks=problem.blocks)


def data_of(name: str, n: int, seed: int) -> list[dict]:
    """Samples; of texts some are padded, so that micro-batches differ in the tokens that count."""
    data = doubles(samples(name, n, seed))
    for i, item in enumerate(data):
        if "input_ids" in item and i % 3 == 0:
            item["attention_mask"][5:] = 0
            if item["labels"].ndim:
                item["labels"][4:] = -100
    return data


class Noisy(Dataset):
    """Samples with other noise at every visit, from torch's random stream."""

    def __init__(self, data: list[dict]):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        pixels = self.data[index]["pixel_values"]
        return {**self.data[index], "pixel_values": pixels + 0.1 * torch.randn_like(pixels)}


def train(case: str, folder: Path, processes: int, resume: Path | None = None, **kwargs) -> dict:
    """Train and evaluate; the adapter's weights (on rank 0), the logs, and what a run from the start predicts."""
    name, mode, config, settings = CASES[case]
    if resume and "load_best_model_at_end" not in settings:
        kwargs = {"save_strategy": "no", **kwargs}
    model = adapt(name, mode, head_parallel=processes > 1, **{"policy": "test_random_cells", **config})
    args = arguments(
        folder, **{
            "gradient_accumulation_steps": 4, "max_steps": STEPS, "eval_strategy": "steps", "eval_steps": SAVED,
            "per_device_eval_batch_size": 4, "save_strategy": "steps", "save_steps": SAVED, "save_total_limit": None,
            "include_num_input_tokens_seen": "all", "average_tokens_across_devices": True, **settings, **kwargs,
        },
    )  # fmt: skip
    data = data_of(name, SAMPLES, 3)
    if case == "noise":
        data = Noisy(data)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
    trainer = D2FTTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data_of(name, 6, 5),
        compute_metrics=lambda p: {"rows": len(p.predictions), "mean": float(np.mean(p.predictions))},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    predictions = [] if resume else trainer.predict(data_of(name, 5, 6)).predictions
    parallel = trainer.head_parallel
    weights = model.state_dict() if parallel is None else parallel.gather_state_dict() or {}
    timed = ("runtime", "per_second", "preparation_time")
    logs = [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history]
    held = sum(p.numel() for p in model.parameters())
    return {"weights": adapter_of(weights) | {k: v for k, v in weights.items() if "modules_to_save" in k},
            "logs": logs, "predictions": torch.tensor(predictions), "held": held}  # fmt: skip


def on_ranks(processes: str, folder: str) -> dict:
    """Everything that some ranks do; starting processes takes longer than the runs."""
    torch.set_num_threads(1)
    register_policy("test_random_cells")(random_cells)
    folder, count = Path(folder), int(processes)
    if count == 4:
        return {"resumed": train("bert", folder / "four", 4, checkpoint_of(folder, 2, "bert"))}
    return {
        "runs": {case: train(case, of_ranks(folder, 2, case), 2) for case in CASES},
        "resumed": {case: train(case, folder / f"again {case}", 2, checkpoint_of(folder, 2, case)) for case in CASES},
        "from one": train("llama", folder / "from one", 2, checkpoint_of(folder, 1, "llama")),
        "errors": errors(folder),
        "settings": {what: losses_with(folder, what, 2) for what in SETTINGS},
        "bare loop": [bare_loop(folder / f"bare {mode}", mode) for mode in MODES_OF_LOOP],
    }


def of_ranks(folder: Path, processes: int, case: str) -> Path:
    return folder / f"{case} by {processes}"


def checkpoint_of(folder: Path, processes: int, case: str) -> Path:
    return of_ranks(folder, processes, case) / f"checkpoint-{SAVED}"


@pytest.fixture(scope="module")
def policies():
    register_policy("test_random_cells")(random_cells)
    yield
    del registry._POLICIES["test_random_cells"], registry._FACTS["test_random_cells"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder, policies):
    """Every run on one process, which is not interrupted."""
    return {case: train(case, of_ranks(folder, 1, case), 1) for case in ALIKE}


@pytest.fixture(scope="module")
def two(tmp_path_factory, folder, one):
    return run(__name__, "on_ranks", tmp_path_factory.mktemp("two"), "2", str(folder), processes=2)


def assert_equal(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys() and ours
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("case", ALIKE)
def test_two_ranks_train_the_weights_of_one_process(one, two, case):
    assert_equal(two[0]["runs"][case]["weights"], one[case]["weights"])
    assert two[1]["runs"][case]["held"] == two[0]["runs"][case]["held"] < one[case]["held"]


@pytest.mark.parametrize("case", ALIKE)
def test_logs_and_metrics_are_those_of_one_process(one, two, case):
    for of_rank in two:
        ours, theirs = of_rank["runs"][case]["logs"], one[case]["logs"]
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            travelled = mine.pop("row_bytes", None)
            assert (travelled is None) == ("compute_ratio" not in other or "train_loss" in other) and travelled != 0
            # Where a rank's heads are a device, the devices' loads differ less than those of single heads.
            for log in (mine, other):
                log.pop("workload_variance", None)
            assert mine == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("case", ALIKE)
def test_predictions_are_those_of_one_process(one, two, case):
    for of_rank in two:
        torch.testing.assert_close(of_rank["runs"][case]["predictions"], one[case]["predictions"])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_resume_to_the_weights_of_an_uninterrupted_run(two, case):
    assert_equal(two[0]["resumed"][case]["weights"], two[0]["runs"][case]["weights"])


@pytest.mark.parametrize("case", ALIKE)
def test_one_process_resumes_what_two_ranks_saved(tmp_path, folder, one, two, case):
    again = train(case, tmp_path, 1, checkpoint_of(folder, 2, case))
    assert_equal(again["weights"], one[case]["weights"])


def test_two_ranks_resume_what_one_process_saved(one, two):
    assert_equal(two[0]["from one"]["weights"], one["llama"]["weights"])


@pytest.mark.slow
def test_four_ranks_resume_what_two_saved(tmp_path, folder, one, two):
    four = run(__name__, "on_ranks", tmp_path, "4", str(folder), processes=4)
    assert_equal(four[0]["resumed"]["weights"], one["bert"]["weights"])


def test_the_optimizer_is_saved_as_one_process_would_have_it(folder, one, two):
    path = checkpoint_of(folder, 2, "llama") / OPTIMIZER_FILE
    theirs = torch.load(checkpoint_of(folder, 1, "llama") / "optimizer.pt", weights_only=True)
    ours = load_file(path)
    model = adapt("llama", "lora")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for index, of_one in theirs["state"].items():
        for kind, value in of_one.items():
            torch.testing.assert_close(ours.pop(f"{names[index]}.{kind}"), value, rtol=1e-8, atol=1e-12)
    assert not ours


MODES_OF_LOOP = ["boundary", "lora"]


def bare_loop(folder: Path, mode: str) -> float:
    """Largest difference of a weight between three steps and two, a checkpoint, and one step from there."""
    case = Case("gpt2", mode, (2, 1, 2))

    def start(seed: int):
        model = model_of(case, head_parallel=True, seed=0, policy="random", compute_budget=0.6)
        if seed:  # so that what is not loaded shows
            for parameter in model.parameters():
                parameter.data += 0.1 * parameter.requires_grad
        parallel = HeadParallel(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trained[:5], "weight_decay": 0.1}, {"params": trained[5:], "lr": 0.02 * (1 + seed)}]
        return parallel, torch.optim.AdamW(groups, lr=0.01 * (1 + seed), betas=(0.8, 0.9 - 0.1 * seed))

    def go(parallel, optimizer, steps):
        for step in steps:
            parallel.forward_backward(batches_of(case, step))
            optimizer.step()
            optimizer.zero_grad()

    parallel, optimizer = start(0)
    go(parallel, optimizer, (0, 1))
    parallel.save_checkpoint(folder, optimizer)
    again, again_optimizer = start(1)
    again.load_checkpoint(folder, again_optimizer)
    for each, its_optimizer in ((parallel, optimizer), (again, again_optimizer)):
        go(each, its_optimizer, (2, 3))
    pairs = zip(parallel.model.parameters(), again.model.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("index", range(len(MODES_OF_LOOP)))
def test_a_bare_loop_continues_from_its_checkpoint(two, index):
    for of_rank in two:
        assert of_rank["bare loop"][index] == 0


class Stream(IterableDataset):
    """Samples one after the other."""

    def __init__(self, data: list[dict]):
        self.data = data

    def __iter__(self):
        return iter(self.data)


SETTINGS = {
    "bf16": {"bf16": True},
    "stream": {},
    "dispatched stream": {"accelerator_config": {"dispatch_batches": True}},
    "split batches": {"accelerator_config": {"split_batches": True}},
}


def losses_with(folder: Path, what: str, processes: int) -> list[float]:
    model = adapt("llama", "lora", num_full=1, head_parallel=processes > 1).float()
    args = arguments(folder / "settings", gradient_accumulation_steps=2, max_steps=2, **SETTINGS[what])
    data = data_of("llama", 16, 3)
    trainer = D2FTTrainer(model=model, args=args, train_dataset=Stream(data) if "stream" in what else data)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_of_the_trainer_mean_what_they_mean_on_one_process(tmp_path, two, what):
    expected = losses_with(tmp_path, what, 1)
    for of_rank in two:
        assert of_rank["settings"][what] == pytest.approx(expected, rel=5e-3 if what == "bf16" else 1e-5)


def load_other_rank(folder: Path) -> None:
    model = get_peft_model(TINY["vit"].build().double(), D2FTConfig(r=2, head_parallel=True, num_full=1))
    HeadParallel(model).load_adapter(folder)


def load_other_optimizer(folder: Path) -> None:
    model = adapt(head_parallel=True, num_full=1)
    parallel = HeadParallel(model)
    parallel.load_optimizer(torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), folder)


def errors(folder: Path) -> dict[str, str]:
    """What two ranks say to settings that do not go with shared-out heads."""

    def start(kind=D2FTTrainer, resume=None, callbacks=None, **kwargs):
        model = adapt(head_parallel=True, num_full=1)
        args = arguments(folder / "errors", **{"save_strategy": "no", "max_steps": 1, **kwargs})
        trainer = kind(model=model, args=args, train_dataset=data_of("vit", 8, 3), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)

    return {
        "each": message(lambda: start(gradient_accumulation_steps=1)),
        "callback": message(lambda: start(Trainer, callbacks=[D2FTCallback()])),
        "nodes": message(lambda: start(save_on_each_node=True)),
        "optimizer": message(lambda: start(optim="adafactor", save_strategy="steps", save_steps=1)),
        "other adapter": message(lambda: start(resume=str(checkpoint_of(folder, 2, "llama")))),
        "other rank": message(lambda: load_other_rank(checkpoint_of(folder, 2, "fisher"))),
        "other optimizer": message(lambda: load_other_optimizer(checkpoint_of(folder, 2, "vit"))),
    }


@pytest.mark.parametrize(
    ("what", "says"),
    {
        "each": "ValueError: gradient_accumulation_steps=1 does not go with head_parallel=True, which runs",
        "callback": "ValueError: head_parallel=True needs the same batches on all processes, and this Trainer was made",
        "nodes": "ValueError: save_on_each_node=True does not go with head_parallel=True",
        "optimizer": "ValueError: Adafactor keeps 'exp_avg_sq_row' of shape",
        "other adapter": "ValueError: the adapter in",
        "other rank": "ValueError: base_model.model.vit.layers.0.attention.q_proj.lora_A.weight in",
        "other optimizer": "ValueError: the optimizer's state in",
    }.items(),
)
def test_errors_speak_on_every_rank(two, what, says):
    for of_rank in two:
        assert of_rank["errors"][what].startswith(says)
