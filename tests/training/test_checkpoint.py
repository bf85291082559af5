"""A run that is resumed from any of its checkpoints ends with the same bits, and writes the same log."""

import json
import os
import shutil

import pytest
import torch
from safetensors.numpy import load_file, save_file

from d2ft_peft import D2FTTrainer
from d2ft_peft.planning.state import ARRAYS_FILE, STATE_FILE, load_state
from d2ft_peft.schedule import policy_names
from tests.test_trainer import adapt, arguments, assert_equal, samples, trained
from tests.training.test_step_log import pad, texts


RAGGED = texts([4, 4] + [5 + 9 * i % 40 for i in range(58)])


def train(folder, config, resume=None, data=None, steps=6, every=2, accumulation=4, **kwargs):
    """Weights, and what was logged of each step; every second step is a checkpoint."""
    name, mode = ("llama", "lora") if data is RAGGED else ("vit", "full")
    model = adapt(name, mode, **config).float()
    args = arguments(
        folder, max_steps=steps, save_strategy="steps", save_steps=every, gradient_accumulation_steps=accumulation,
        learning_rate=3e-2, **kwargs,
    )  # fmt: skip
    collator = {"data_collator": pad} if data is RAGGED else {}
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data or samples(n=60), **collator)
    trainer.train(resume_from_checkpoint=resume)
    unsteady = {"total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    entries = [{k: v for k, v in entry.items() if k not in unsteady} for entry in trainer.state.log_history]
    return trained(model), entries


def assert_resumes(folder, config, stops=(2, 4), **kwargs):
    """From checkpoints that an uninterrupted run leaves on its way."""
    weights, entries = train(folder / "whole", config, **kwargs)
    for stop in stops:
        again, lines = train(folder / "again", config, str(folder / "whole" / f"checkpoint-{stop}"), **kwargs)
        assert_equal(again, weights)
        assert lines == entries, stop


NEEDS = {
    "bilevel": {"forward_score": "weight_magnitude"}, "joint": {"forward_score": "weight_magnitude"},
    "all_full": {"compute_budget": 1.0}, "drop_bp": {"compute_budget": 0.8}, "lisa": {"compute_budget": 0.8},
    "fewer_tokens": {"compute_budget": 0.9},
}  # fmt: skip
POLICIES = [name for name in policy_names() if not name.startswith("test")]


@pytest.mark.quick(1)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(tmp_path, policy):
    """What a policy keeps for an interval of ten steps is kept over a stop within it."""
    assert_resumes(tmp_path, {"policy": policy, "compute_budget": 0.6, **NEEDS.get(policy, {})})


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["depth", "random", "importance"])
def test_ragged_lengths(tmp_path, policy):
    """Costs are those of the length that the run began with, whatever batch a resumed one sees first."""
    assert_resumes(tmp_path, {"policy": policy, "compute_budget": 0.5}, data=RAGGED)


WINDOWS = {
    "whole windows": 20,  # ten steps an epoch
    "the rest of an epoch is a short window": 14,  # seven steps
    "epochs are shorter than the window": 4,  # two steps
    "a last batch of one": 13,
}


@pytest.mark.thorough
@pytest.mark.parametrize("size", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("config", [{"num_full": 3}, {"policy": "importance", "compute_budget": 0.5}])
def test_windows(tmp_path, config, size):
    """From within a window, on the same samples; from where one begins; and where an epoch ends."""
    data = samples(n=size)
    assert_resumes(tmp_path, config, (1, 3, 4, 5, 7), data=data, accumulation=1, steps=8, every=1)


@pytest.mark.thorough
@pytest.mark.parametrize("size", [26, 13], ids=["short last step", "a last batch of one"])
def test_rests_of_epochs(tmp_path, size):
    assert_resumes(tmp_path, {"policy": "random", "compute_budget": 0.5}, data=samples(n=size))


@pytest.mark.thorough
def test_weights_that_are_trained_in_place(tmp_path):
    assert_resumes(tmp_path, {"policy": "random", "compute_budget": 0.5, "keep_base": False})


@pytest.mark.thorough
def test_means_of_features(tmp_path):
    assert_resumes(tmp_path, {"policy": "random", "compute_budget": 0.5, "shortcut": "mean"})


@pytest.mark.thorough
@pytest.mark.parametrize("accumulation", [1, 4])
def test_ratios_of_an_entry_that_spans_a_checkpoint(tmp_path, accumulation):
    """The Trainer forgets the losses before it; what was executed is remembered."""
    config = {"policy": "random", "compute_budget": 0.5}
    found = [
        train(tmp_path, config, resume, accumulation=accumulation, logging_steps=3)[1]
        for resume in (None, str(tmp_path / "checkpoint-2"))
    ]
    whole, resumed = [[entry["flops_ratio"] for entry in entries] for entries in found]
    assert whole == resumed and len(whole) == 3


FISHER = {"backward_score": "fisher", "num_full": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run with scores of samples."""
    folder = tmp_path_factory.mktemp("fisher")
    train(folder, FISHER)
    return folder / "checkpoint-2"


def test_scores_are_written_once(checkpoint):
    """They may be larger than the model, and are the same in every checkpoint."""
    files = [path / "d2ft_fisher.safetensors" for path in sorted(checkpoint.parent.glob("checkpoint-*"))]
    assert len(files) == 3 and len({os.stat(path).st_ino for path in files}) == 1


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_other_bytes(path):
    path.write_bytes(bytes(path.stat().st_size))


def without(key):
    def remove(path):
        state = json.loads(path.read_text())
        del state[key]
        path.write_text(json.dumps(state))

    return remove


def of_an_older_version(path):
    path.write_text(json.dumps({"rng": {}, "step": 3}))


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "file, damage, message",
    [
        (STATE_FILE, os.remove, f"has no {STATE_FILE}: it was not written by a D2FT trainer"),
        (STATE_FILE, cut, f"{STATE_FILE}' is damaged"),
        (STATE_FILE, of_other_bytes, f"{STATE_FILE}' is damaged"),
        (STATE_FILE, without("costs"), f"{STATE_FILE}' is damaged, .*costs"),
        (STATE_FILE, of_an_older_version, f"{STATE_FILE}' .* another version"),
        ("d2ft_fisher.safetensors", os.remove, "d2ft_fisher.safetensors' is missing"),
        ("d2ft_fisher.safetensors", cut, "d2ft_fisher.safetensors' has .* bytes and should have"),
        ("d2ft_fisher.safetensors", of_other_bytes, "d2ft_fisher.safetensors'? .*damaged|damaged.*fisher"),
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, checkpoint, file, damage, message):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    damage(folder / file)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "again", FISHER, str(folder))


def test_scores_belong_to_a_data_set(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="a data set of 60 samples, which its scores .* this one has 44"):
        train(tmp_path, FISHER, str(checkpoint), data=samples(n=44))


@pytest.mark.thorough
def test_another_number_of_accumulation_steps_is_followed(tmp_path):
    """A resumed run schedules what a fresh one with its arguments does."""
    config = {"policy": "round_robin", "num_full": 2, "num_forward_only": 1}
    train(tmp_path / "five", config, accumulation=5, steps=2)
    _, fresh = train(tmp_path / "three", config, accumulation=3)
    _, resumed = train(tmp_path / "again", config, str(tmp_path / "five" / "checkpoint-2"), accumulation=3)
    ratios = [{entry["compute_ratio"] for entry in entries[2:-1]} for entries in (fresh, resumed)]
    assert ratios[0] == ratios[1] and len(ratios[0]) == 1


def test_damaged_arrays_are_named(tmp_path):
    train(tmp_path, {"policy": "importance", "compute_budget": 0.5}, steps=2)
    folder = tmp_path / "checkpoint-2"
    assert "live.loss" in load_file(folder / ARRAYS_FILE)
    of_other_bytes(folder / ARRAYS_FILE)
    with pytest.raises(ValueError, match=f"{ARRAYS_FILE}' is damaged"):
        train(tmp_path / "again", {"policy": "importance", "compute_budget": 0.5}, str(folder))


@pytest.mark.thorough
def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path):
    """It says why, which is not that somebody else wrote them."""
    train(tmp_path, {"num_full": 2}, steps=2, save_only_model=True)
    with pytest.raises(ValueError, match="weights alone .save_only_model=True"):
        train(tmp_path / "again", {"num_full": 2}, str(tmp_path / "checkpoint-2"))


def test_what_is_written_is_whole_or_not_there(tmp_path, checkpoint, monkeypatch):
    """A run that dies while it writes leaves the former file."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    before = (folder / STATE_FILE).read_bytes()

    def dies(state, file, **kwargs):
        file.write("{")
        raise OSError("no space left on device")

    monkeypatch.setattr("d2ft_peft.planning.state.json.dump", dies)
    with pytest.raises(OSError, match="no space"):
        train(tmp_path, FISHER, steps=2)
    assert (folder / STATE_FILE).read_bytes() == before


def test_a_state_that_is_no_state_leaves_the_planner_alone(tmp_path):
    from d2ft_peft import D2FTPlanner

    planner = D2FTPlanner(adapt())
    save_file({"x": torch.zeros(1).numpy()}, tmp_path / ARRAYS_FILE)
    with pytest.raises(ValueError, match=f"has no {STATE_FILE}"):
        load_state(planner, tmp_path)
    assert planner.step == 0
