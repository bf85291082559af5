"""Whatever computes the loss, a step's gradient is the mean over the items that ran."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, default_data_collator

from d2ft_peft import D2FTCallback, D2FTPlanner, D2FTTrainer
from d2ft_peft.training.normalization import WatchedItems
from tests.models import TINY
from tests.test_trainer import adapt, arguments, trained


STEP = {"policy": "bilevel", "compute_budget": 0.6}  # of five micro-batches the first three run


def sentences(n=10, ignored=(), ragged=False):
    """Sequences for a causal model; of `ignored` samples no label counts, of ragged ones some do."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(n):
        ids = torch.randint(3, 60, (7,), generator=generator)
        labels = ids.clone()
        labels[: 7 if i in ignored else (i % 5 + 1 if ragged else 0)] = -100
        items.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return items


def classified(n=10):
    batch = TINY["bert"].batch(n, seed=2)
    return [{key: value[i] for key, value in batch.items()} for i in range(n)]


class KeepsGradient(TrainerCallback):
    """The gradient of the first optimizer step, by name."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def gradient_of(cls, name, data, folder, budget=STEP, **kwargs):
    """The gradient of one step of a Trainer class that reads the data in order."""
    keeps = KeepsGradient()

    class InOrder(cls):
        def _get_train_sampler(self, *args):
            return None

    callbacks = [keeps] if issubclass(cls, D2FTTrainer) else [D2FTCallback(), keeps]
    own = {"compute_loss_func": kwargs.pop("compute_loss_func", None)}
    args = arguments(folder, gradient_accumulation_steps=5, max_steps=1, max_grad_norm=0, **kwargs)
    trainer = InOrder(
        model=adapt(name, "lora", **budget), args=args, train_dataset=data, callbacks=callbacks, **own
    )  # fmt: skip
    trainer.train()
    return keeps.gradient, trainer


def mean_over_what_ran(name, data, smoothing=0.0):
    """The same by hand: cross-entropy, summed over three micro-batches of two, divided by their labels that count."""
    model = adapt(name, "lora", **STEP).train()
    planner = D2FTPlanner(model, 5)
    batches = [default_data_collator(data[2 * i : 2 * i + 2]) for i in range(5)]
    schedule = planner.plan([dict(batch) for batch in batches])
    assert list(schedule.skipped) == [False, False, False, True, True]
    losses, items = [], 0
    for i in range(3):
        with planner.micro_batch(i):
            logits, labels = model(**batches[i]).logits, batches[i]["labels"]
            if labels.ndim > 1:
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", label_smoothing=smoothing)
            losses.append(loss)
            items += int((labels != -100).sum())
    (sum(losses) / items).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert any(value.abs().max() > 1e-6 for value in theirs.values())
    for key, value in theirs.items():
        # transformers computes a causal model's loss in float32
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-7, msg=key)


DATA = {
    "llama": sentences(),
    "llama, first micro-batch without labels": sentences(ignored=(0, 1)),
    "llama, second micro-batch without labels": sentences(ignored=(2, 3)),
    "llama, ragged labels": sentences(ragged=True),
    "bert": classified(),
}


@pytest.mark.thorough
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", DATA)
def test_the_models_own_loss(tmp_path, case, smoothing):
    """Also of a model that ignores the number of items (BERT), and under the Trainer's label smoothing."""
    name = case.partition(",")[0]
    ours, _ = gradient_of(D2FTTrainer, name, DATA[case], tmp_path, label_smoothing_factor=smoothing)
    assert_same(ours, mean_over_what_ran(name, DATA[case], smoothing))


def own(reduction, divide, declared=None):
    """A compute_loss as the Trainer's documentation has it, which never calls the Trainer's own."""

    class Own:
        loss_is_scaled_for_ga = declared

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            logits = outputs.logits
            if labels.ndim > 1:
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)
            if divide:
                loss = loss / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    return Own


OWN = {
    "mean of the batch": own("mean", False),
    "mean of the batch, declared": own("mean", False, declared=False),
    "divided by the items": own("sum", True),
    "divided by the items, declared": own("sum", True, declared=True),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("base", [D2FTTrainer, Trainer], ids=["subclass", "callback"])
@pytest.mark.parametrize("case", ["llama", "llama, second micro-batch without labels", "llama, ragged labels", "bert"])
@pytest.mark.parametrize("loss", OWN)
def test_a_loss_of_ones_own(tmp_path, loss, case, base):
    name = case.partition(",")[0]
    ours, _ = gradient_of(type("T", (OWN[loss], base), {}), name, DATA[case], tmp_path)
    assert_same(ours, mean_over_what_ran(name, DATA[case]))


@pytest.mark.thorough
@pytest.mark.parametrize("divides", [True, False])
def test_a_loss_function(tmp_path, divides):
    def function(outputs, labels, num_items_in_batch=None):
        loss = F.cross_entropy(outputs.logits, labels, reduction="sum" if divides else "mean")
        return loss / num_items_in_batch if divides else loss

    ours, _ = gradient_of(D2FTTrainer, "bert", DATA["bert"], tmp_path, compute_loss_func=function)
    assert_same(ours, mean_over_what_ran("bert", DATA["bert"]))


def test_a_step_in_which_no_label_counts_leaves_the_weights_alone(tmp_path):
    ours, trainer = gradient_of(D2FTTrainer, "llama", sentences(ignored=range(10)), tmp_path)
    assert all((value == 0).all() for value in ours.values())
    assert trainer.state.log_history[0]["loss"] == 0


@pytest.mark.thorough
def test_the_loss_that_is_logged_is_the_mean_over_what_ran(tmp_path):
    """At any budget, where all samples are the same."""
    same, losses = classified(1) * 10, set()
    for budget in (1.0, 0.6, 0.2):
        _, trainer = gradient_of(D2FTTrainer, "bert", same, tmp_path, {"compute_budget": budget})
        losses.add(round(trainer.state.log_history[0]["loss"], 6))
    assert len(losses) == 1


def test_inputs_are_prepared_once(tmp_path):
    """A trainer that generates its inputs there would do it twice."""
    prepared = []

    class Preparing(D2FTTrainer):
        def _prepare_inputs(self, inputs):
            prepared.append(inputs)
            return super()._prepare_inputs(inputs)

    gradient_of(Preparing, "bert", DATA["bert"], tmp_path)
    assert len(prepared) == 3


def test_compute_loss_is_given_back(tmp_path):
    """Evaluation, and whoever calls it next, sees the loss as it is."""
    _, trainer = gradient_of(D2FTTrainer, "bert", DATA["bert"], tmp_path)
    assert "compute_loss" not in vars(trainer)
    assert trainer.args.average_tokens_across_devices
    assert trained(trainer.model)


class TestWatchedItems:
    def items(self):
        return WatchedItems.watch(torch.tensor(6), torch.device("cpu"))

    @pytest.mark.parametrize(
        "look",
        [
            lambda items: items is not None,
            torch.is_tensor,
            lambda items: (items.device, items.dtype, items.shape),
            lambda items: items.to(torch.float64).to("cpu").detach(),
            lambda items: f"{items!r}",
        ],
    )
    def test_looking_at_it_is_no_use(self, look):
        items = self.items()
        look(items)
        assert not items.used

    @pytest.mark.parametrize(
        "compute",
        [
            lambda loss, items: loss / items,
            lambda loss, items: torch.div(loss, items.to(torch.float64)),
            lambda loss, items: loss * (1 / items),
            lambda loss, items: loss / items.item(),
            lambda loss, items: loss / float(items),
            lambda loss, items: loss / torch.stack([items, items]).max(),
            lambda loss, items: loss.clone().div_(items),
        ],
    )
    def test_computing_with_it_is_seen_and_gives_an_ordinary_tensor(self, compute):
        items, loss = self.items(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        result = compute(loss, items)
        assert items.used
        assert type(result) is torch.Tensor
        assert result.item() == pytest.approx(0.5)
        result.backward()
        assert loss.grad.item() == pytest.approx(1 / 6)

    def test_it_is_at_least_one(self):
        assert float(WatchedItems.watch(0, torch.device("cpu"))) == 1

    @pytest.mark.parametrize("look", [lambda items: items > 0, lambda items: bool(items == 6), lambda items: not items])
    def test_comparing_it_is_no_use(self, look):
        items = self.items()
        look(items)
        assert not items.used


@pytest.mark.thorough
def test_a_loss_that_reads_the_number_is_asked_to_say_what_it_is(tmp_path):
    class Reads(D2FTTrainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None):
            self.seen = num_items_in_batch.item()
            return model(**inputs).loss

    with pytest.warns(UserWarning, match="reads num_items_in_batch as a number"):
        gradient_of(Reads, "bert", DATA["bert"], tmp_path)
    Reads.loss_is_scaled_for_ga = False
    ours, _ = gradient_of(Reads, "bert", DATA["bert"], tmp_path)
    assert_same(ours, mean_over_what_ran("bert", DATA["bert"]))
