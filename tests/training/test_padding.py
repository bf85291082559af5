"""Samples of different lengths: micro-batches composed by length change what a step costs, and not its gradient."""

import os
import tempfile

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from d2ft_peft import D2FTPlanner, D2FTTrainer
from d2ft_peft.planning import sample_choice
from d2ft_peft.planning.account import Account
from d2ft_peft.planning.candidates import Candidates, deal
from d2ft_peft.training.sample_lengths import SampleLengths, num_tokens
from tests.distributed.launch import run
from tests.models import TINY
from tests.test_trainer import adapt, arguments, assert_close, assert_equal, doubles, samples, trained, trained_as_plain


@pytest.fixture(autouse=True)
def any_saving_is_worth_a_micro_batch(monkeypatch):
    """Samples of these tests are shorter than what another micro-batch costs."""
    monkeypatch.setattr(sample_choice, "OVERHEAD_TOKENS", 1)


def ragged(name="llama", n=27, seed=0):
    """Items of 2 to 14 tokens; of a causal model's the first ones are a prompt, whose labels do not count."""
    rng = np.random.default_rng(seed)
    items = []
    for length in rng.integers(2, 15, n):
        ids = rng.integers(3, 40, length).tolist()
        labels = int(rng.integers(3)) if name == "bert" else [-100] * int(rng.integers(1, length)) + ids
        items.append({"input_ids": ids, "labels": labels if name == "bert" else labels[:length]})
    return items


def collate(items):
    """Pads on the right to the longest."""
    width = max(len(item["input_ids"]) for item in items)
    rows = [torch.tensor(item["input_ids"]) for item in items]
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(width) < len(row)).long() for row in rows]),
    }
    if isinstance(items[0]["labels"], int):
        return batch | {"labels": torch.tensor([item["labels"] for item in items])}
    labels = [torch.tensor(item["labels"]) for item in items]
    padded = [torch.nn.functional.pad(row, (0, width - len(row)), value=-100) for row in labels]
    return batch | {"labels": torch.stack(padded)}


def train(folder, name="llama", data=None, cls=D2FTTrainer, model=None, args=None, **config):
    usual = {"compute_budget": 1, "skip_unread_rows": False}  # padding alone is looked at
    model = adapt(name, **{**usual, **config}) if model is None else model
    usual = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 5}
    args = arguments(folder, **{**usual, **(args or {})})
    data = ragged(name) if data is None else data
    trainer = cls(model=model, args=args, train_dataset=data, data_collator=collate)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


class InOrder(D2FTTrainer):
    """Reads the data in order."""

    def _get_train_sampler(self, *args):
        return None


def last_log(trainer):
    return next(entry for entry in reversed(trainer.state.log_history) if "flops_ratio" in entry)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("accumulation", [1, 4], ids=["one batch a step", "accumulated"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_composing_by_length_leaves_every_step_as_it_was(tmp_path, name, accumulation, mode):
    """27 samples in batches of 4 end with one of 3, the rest of an epoch; steps of 16 with 11."""
    found = {}
    for padding in ("keep", "compose"):
        batch = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation}
        found[padding] = train(tmp_path, name, mode=mode, padding=padding, args=batch)
    assert_close(trained(found["compose"].model), trained(found["keep"].model))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in found.values()]
    np.testing.assert_allclose(*losses, rtol=1e-6)  # the Trainer adds them up in float32
    keep, composed = (last_log(found[padding]) for padding in ("keep", "compose"))
    assert keep["flops_ratio"] == pytest.approx(1)
    assert composed["flops_ratio"] < 0.9
    assert composed["padding_ratio"] < 0.5 * keep["padding_ratio"]


@pytest.mark.thorough
def test_it_ends_like_the_plain_trainer(tmp_path):
    ours = train(tmp_path, compute_budget=1)
    plain = TINY["llama"].build().double()
    names = trained_as_plain(ours.model).keys()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    train(tmp_path, cls=Trainer, model=plain)
    assert_close(trained_as_plain(ours.model), trained(plain))


def test_the_budget_is_met_first_by_what_no_loss_sees_and_then_by_leaving_samples_out(tmp_path):
    data = ragged(n=64)
    for budget in (0.9, 0.4):
        trainer = train(tmp_path, data=data, compute_budget=budget, args={"max_steps": 12})
        logs = last_log(trainer)
        assert logs["flops_ratio"] == pytest.approx(budget, abs=0.04) or logs["compute_ratio"] == 1
    assert 0.4 < logs["compute_ratio"] < 1  # more samples than 40 %, since those that run are padded less
    # Where padding alone saves enough, every sample runs.
    pair = [{"input_ids": [5] * 30, "labels": [5] * 30}, {"input_ids": [4] * 3, "labels": [4] * 3}]
    logs = last_log(train(tmp_path, data=pair * 16, cls=InOrder, compute_budget=0.6))
    assert logs["compute_ratio"] == 1 and logs["flops_ratio"] < 0.6


@pytest.mark.thorough
def test_other_policies_save_padding_on_top_of_their_budget(tmp_path):
    trainer = train(tmp_path, policy="fewer_samples", compute_budget=0.5, args={"max_steps": 12})
    assert last_log(trainer)["compute_ratio"] == pytest.approx(0.5, abs=0.05)
    assert last_log(trainer)["flops_ratio"] < 0.45


@pytest.mark.quick(1)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path, accumulation):
    args = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "gradient_accumulation_steps": accumulation}
    whole = train(tmp_path, compute_budget=0.5, args=args)
    resumed = train(tmp_path, compute_budget=0.5, args=args | {"resume_from_checkpoint": f"{tmp_path}/checkpoint-3"})
    assert_equal(trained(resumed.model), trained(whole.model))
    assert last_log(resumed)["flops_ratio"] == last_log(whole)["flops_ratio"]


def test_tokens_are_counted_where_they_ran(tmp_path):
    data = ragged(n=16)
    args = {"include_num_input_tokens_seen": "non_padding", "max_steps": 1, "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 16}  # fmt: skip
    trainer = train(tmp_path, data=data, args=args)
    assert len(trainer.planner.schedule.operations) > 1  # several micro-batches in one call of training_step
    assert trainer.state.num_input_tokens_seen == sum(len(item["input_ids"]) for item in data)


def reader(data):
    """Loads items as a session does, and notes which."""
    loads = []

    def load(indices, items):
        missing = [index for index in indices if index not in items]
        loads.extend(missing)
        items.update({index: data[index] for index in missing})

    return loads, load


def test_without_lengths_nothing_is_loaded_to_know_them():
    loads, load = reader([{"pixel_values": torch.zeros(3, 4, 4)}] * 9)
    lengths = SampleLengths()
    assert lengths.of(np.arange(4), {2: {"pixel_values": torch.zeros(3, 4, 4)}}, load) is None
    assert loads == [] and not lengths.differ


def test_lengths_are_read_once():
    data, lengths = ragged(n=9), SampleLengths()
    loads, load = reader(data)
    for _ in range(2):
        found = lengths.of(np.array([3, 8, 3, 1]), {}, load)
        assert found.tolist() == [len(data[index]["input_ids"]) for index in (3, 8, 3, 1)]
    assert sorted(loads) == [1, 3, 8]


@pytest.mark.parametrize(
    "ids, tokens",
    [([5, 6, 7], 3), (np.array([5, 6]), 2), (torch.tensor([5]), 1), ([], 1), ([[5, 6], [7]], None), (None, None)],
)
def test_only_a_single_row_of_token_ids_has_a_length(ids, tokens):
    assert num_tokens({"input_ids": ids}) == tokens


def test_a_stream_leaves_whole_micro_batches_out_and_says_so(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(samples())

    trainer = D2FTTrainer(model=adapt(compute_budget=0.5).float(), args=arguments(tmp_path), train_dataset=Stream())
    with pytest.warns(UserWarning, match="whole micro-batches are left out"):
        trainer.train()
    assert last_log(trainer)["compute_ratio"] == pytest.approx(0.5, abs=0.1)


def test_a_loader_of_ones_own_leaves_whole_micro_batches_out_and_says_so(tmp_path):
    class Own(D2FTTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)

    trainer = Own(
        model=adapt("llama", compute_budget=0.5),
        args=arguments(tmp_path),
        train_dataset=ragged(),
        data_collator=collate,
    )
    with pytest.warns(UserWarning, match="already collated"):
        trainer.train()
    assert last_log(trainer)["compute_ratio"] == pytest.approx(0.5, abs=0.13)


def test_what_was_spent_before_the_first_step_is_taken_from_all_of_them():
    account = Account(0.6)
    account.prepay(20.0, steps=10)
    spent = 0.0
    for _ in range(10):
        ran = min(100.0, account.allowance(100.0))
        account.settle(100.0, ran, 0.5 * ran)  # half of what runs turns out to be saved
        spent += 0.5 * ran
    assert spent <= 0.6 * 1000 - 20
    assert account.left >= 0


def test_hands_are_dealt_with_equally_many_samples_and_tokens():
    lengths = np.random.default_rng(0).integers(2, 200, 96)
    hands = deal(lengths, 4)
    assert sorted(np.concatenate(hands)) == list(range(96))
    assert {len(hand) for hand in hands} == {24}
    sums = [lengths[hand].sum() for hand in hands]
    assert max(sums) < 1.02 * min(sums)


def test_the_loaders_own_batches_are_the_price_of_plain_training():
    lengths = np.array([3, 9, 2, 4, 7])
    candidates = Candidates.of_loader(np.arange(5), 2, lengths)
    assert candidates.batches == ((2.0, 9), (2.0, 4), (1.0, 7))
    planner = D2FTPlanner(adapt("llama", compute_budget=1).train())
    planner.prepare(collate(ragged(n=2)))
    planner.compose(np.arange(5), 2, lengths)
    expected = sum(planner.costs.full_flops([batch]) for batch in candidates.batches)
    assert planner._planned.prices.plain == pytest.approx(expected)


def train_in_a_process(budget, name):
    """Train on this process's share; what was trained, and the tokens that it ran."""
    sample_choice.OVERHEAD_TOKENS = 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(
            folder, name, data=ragged(name, n=32), compute_budget=float(budget),
            args={"per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", 1)), "max_steps": 4,
                  "gradient_accumulation_steps": 2, "seed": 0},
        )  # fmt: skip
    totals = trainer.planner.counts.of_run
    return {**trained(trainer.model), "padded": torch.tensor(totals.padded), "flops": torch.tensor(totals.flops)}


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_two_processes_equal_one_and_do_equal_work(tmp_path, name):
    ranks = run(__name__, "train_in_a_process", tmp_path, "1", name)
    alone = train_in_a_process("1", name)
    for key, value in alone.items():
        if key not in ("padded", "flops"):
            torch.testing.assert_close(ranks[0][key], ranks[1][key], rtol=0, atol=0)
            torch.testing.assert_close(ranks[0][key], value, rtol=1e-7, atol=1e-9, msg=key)
    padded = [float(one["padded"]) for one in ranks]
    assert max(padded) < 1.1 * min(padded)


@pytest.mark.thorough
@pytest.mark.distributed
def test_two_processes_keep_a_budget_together(tmp_path):
    ranks = run(__name__, "train_in_a_process", tmp_path, "0.5", "llama")
    for key, value in ranks[0].items():
        if key not in ("padded", "flops"):
            assert torch.equal(ranks[1][key], value), key


def test_items_that_are_images_run_as_before(tmp_path):
    """Nothing is composed by length where there are no token ids."""
    data = doubles(samples())
    found = [
        D2FTTrainer(model=adapt(compute_budget=0.5, padding=padding), args=arguments(tmp_path), train_dataset=data)
        for padding in ("keep", "compose")
    ]
    for trainer in found:
        trainer.train()
    assert_equal(trained(found[0].model), trained(found[1].model))


@pytest.mark.quick(1)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_without_padding_leave_every_step_as_it_was(tmp_path, attention):
    found, data = {}, ragged()
    for item in data[::2]:
        item["labels"] = list(item["input_ids"])  # also where the first token, which nothing predicts, is counted
    for padding in ("keep", "flatten"):
        model = adapt("llama", compute_budget=1, padding=padding, skip_unread_rows=False)
        model.get_base_model().set_attn_implementation(attention)
        found[padding] = train(tmp_path, data=data, model=model)
    for name, value in trained(found["keep"].model).items():
        # Attention's softmax is of float32 under eager, and sums another number of terms.
        torch.testing.assert_close(trained(found["flatten"].model)[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert last_log(found["flatten"])["padding_ratio"] == 0 < last_log(found["keep"])["padding_ratio"]


def test_what_does_not_keep_samples_apart_does_not_get_them_in_one_row(tmp_path):
    with pytest.raises(ValueError, match="padding='flatten' puts samples of causal language models"):
        train(tmp_path, "bert", padding="flatten")
    model = adapt("llama", compute_budget=1, padding="flatten")
    attention = type(model.get_base_model().model.layers[0].self_attn)
    kept = attention.forward
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="does not keep samples in one row apart"),
    ):
        patch.setattr(
            attention, "forward", lambda self, *args, **kwargs: kept(self, *args, **{**kwargs, "attention_mask": None})
        )
        train(tmp_path, model=model)
    with pytest.raises(ValueError, match="one has .*'weight'.*choose padding='compose'"):
        train(
            tmp_path,
            data=[{**item, "weight": 1} for item in ragged()],
            padding="flatten",
            args={"remove_unused_columns": False},
        )
