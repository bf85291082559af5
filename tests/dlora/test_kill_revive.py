"""Kill-and-Revive in a bare loop: what is saved, what a probe sees, and what is refused."""

import copy
import io
import math
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn

from d2ft_peft.costs import flop_counter
from d2ft_peft.dlora import KillRevive
from d2ft_peft.dlora.kill_revive import Observations, decide
from tests.dlora.kill_revive_methods import adam, adapt, batch, lora
from tests.models import TINY


def prepared(config=None, **rule):
    """A model, its optimizer and what kills and revives."""
    model = adapt(config or lora(init_lora_weights="gaussian"))
    optimizer = adam(model)
    return model, optimizer, KillRevive(model, optimizer, **{"active": 2, "interval": 3, **rule})


def train(model, optimizer, kill_revive, first, last):
    for step in range(first, last):
        model(**batch(seed=step, n=1 + step % 3)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        kill_revive.step()
        optimizer.zero_grad()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def indices(kill_revive, *names):
    return [kill_revive.names.index(name) for name in names]


class Scripted:
    """Decisions by name, in the order in which they are asked for."""

    def __init__(self, *choices):
        self.choices, self.seen = list(choices), []

    def __call__(self, rule, state, observations):
        self.seen.append(observations)
        active = tuple(sorted(self.choices.pop(0)))
        before = set(state.active)
        after = type(state)(active, state.known, state.decisions + 1)
        return after, tuple(sorted(before - set(active))), tuple(sorted(set(active) - before))


def test_a_revived_module_goes_on_with_the_momentum_that_it_had():
    decide = Scripted([0], [1], [0])
    model, optimizer, kill_revive = prepared(interval=2, decide=decide)
    train(model, optimizer, kill_revive, 0, 4)
    (module,) = [m for m in kill_revive._modules if m.name == kill_revive.names[0]]
    before = copy.deepcopy([optimizer.state[p] for p in module.parameters])
    train(model, optimizer, kill_revive, 4, 6)
    after = [optimizer.state[p] for p in module.parameters]
    assert kill_revive.state.active == (0,)
    for one, other in zip(before, after, strict=True):
        assert one["step"] == other["step"] > 0 and torch.equal(one["exp_avg"], other["exp_avg"])
    train(model, optimizer, kill_revive, 6, 7)
    assert [optimizer.state[p]["step"] for p in module.parameters] == [one["step"] + 1 for one in before]


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adamax]
)
def test_any_torch_optimizer_leaves_killed_modules_alone(optimizer_class):
    model = adapt(lora(init_lora_weights="gaussian"))
    options = {"momentum": 0.9} if optimizer_class in (torch.optim.SGD, torch.optim.RMSprop) else {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters[:5], "lr": 0.1}, {"params": parameters[5:], "lr": 0.05}]  # cut through a module
    optimizer = optimizer_class(groups, weight_decay=0.1, **options)
    kill_revive = KillRevive(model, optimizer, active=2, interval=2, choose="redrawn")
    for step in range(5):
        idle, before = set(kill_revive.names) - set(kill_revive.active), weights(model)
        train(model, optimizer, kill_revive, step, step + 1)
        for name, value in weights(model).items():
            assert torch.equal(value, before[name]) == any(f".{module}.lora_" in name for module in idle), name


def flops(model):
    with flop_counter() as counter:
        model(**batch()).loss.backward()
    return counter.get_total_flops()


@pytest.mark.quick(1)
@pytest.mark.parametrize("checkpointing", [None, "plain", "with input gradients"])
def test_backward_ends_below_the_lowest_active_module(checkpointing):
    counts = {}
    for active in ([0], [4], [8], range(9)):  # of blocks 0, 1, 2; all
        model = adapt(lora(init_lora_weights="gaussian"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if checkpointing == "with input gradients":
                model.enable_input_require_grads()
            model.train()
        optimizer = adam(model)
        kill_revive = KillRevive(model, optimizer, active=1, interval=1, decide=Scripted(active), choose="redrawn")
        kill_revive.step()
        counts[tuple(active)[-1], len(active)] = flops(model)
    assert counts[8, 1] < counts[4, 1] < counts[0, 1] < counts[8, 9]


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        model, optimizer, kill_revive = prepared(interval=2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            model.train()
        train(model, optimizer, kill_revive, 0, 6)
        found.append(weights(model))
    assert_same(*found)


def test_reentrant_checkpointing_keeps_the_gradients_that_it_needs():
    found = []
    for reentrant in (None, True):
        model, optimizer, kill_revive = prepared(interval=2)
        if reentrant:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.train()
        train(model, optimizer, kill_revive, 0, 6)
        found.append(weights(model))
    assert_same(*found)


def test_a_probe_leaves_active_gradients_as_they_are_and_nothing_else_behind():
    """The step before a decision, in two micro-batches; the second has no probe."""
    found, seen = [], []
    for rule in ({}, {"idle": "last"}):
        model, _, kill_revive = prepared(interval=1, **rule)
        for seed in (0, 1):
            model(**batch(seed=seed)).loss.backward()
            trainable = {n for n, p in model.named_parameters() if p.requires_grad}
            with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
            assert len(with_gradient) == 4
            assert all(any(f".{name}.lora_" in n for name in kill_revive.active) for n in with_gradient)
            seen.append(len(trainable))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)
    assert len(found[0]) == 4 and seen == [18, 4, 4, 4]


def test_a_probe_reads_the_gradient_norms_of_its_micro_batch():
    decide = Scripted([0, 1])
    model, _, kill_revive = prepared(interval=1, decide=decide)
    plain = adapt(lora(init_lora_weights="gaussian"))
    plain(**batch(seed=4)).loss.backward()
    for seed in (4, 5):
        model(**batch(seed=seed)).loss.backward()
    kill_revive.step()
    for name, norm in zip(kill_revive.names, decide.seen[0].gradient, strict=True):
        own = [p.grad.norm() for n, p in plain.named_parameters() if f".{name}.lora_" in n]
        assert len(own) == 2 and norm == pytest.approx(float(torch.stack(own).norm()), rel=1e-5)


def test_changes_are_measured_from_the_last_decision():
    decide = Scripted([0, 1], [0, 1])
    model, optimizer, kill_revive = prepared(interval=2, decide=decide)
    train(model, optimizer, kill_revive, 0, 2)
    before = weights(model)
    train(model, optimizer, kill_revive, 2, 4)
    for index, name in enumerate(kill_revive.names):
        parts = [(value - before[n]).norm() for n, value in weights(model).items() if f".{name}.lora_" in n]
        change = decide.seen[1].change[index]
        assert change is None if index > 1 else change == pytest.approx(float(torch.stack(parts).norm()), rel=1e-5)


def test_norms_can_be_relative_or_by_value():
    for norm in ("relative", "rms"):
        decide = Scripted([0, 1])
        model, optimizer, kill_revive = prepared(interval=1, norm=norm, decide=decide)
        train(model, optimizer, kill_revive, 0, 1)
        module = kill_revive._modules[0]
        square = sum(float((p.detach() ** 2).sum()) for p in module.parameters) if norm == "relative" else module.size
        assert decide.seen[0].scale[0] == pytest.approx(math.sqrt(square), rel=1e-5)


def test_norms_that_are_not_finite_do_not_break_a_run():
    model, optimizer, kill_revive = prepared(interval=1)
    first = kill_revive._modules[kill_revive.state.active[0]].parameters[0]
    model(**batch()).loss.backward()
    first.data.fill_(math.nan)
    kill_revive.step()
    assert len(kill_revive.active) == 2 and kill_revive.state.decisions == 1


def test_without_a_forward_pass_a_probe_says_so():
    _, _, kill_revive = prepared(interval=1)
    with pytest.warns(UserWarning, match="saw no forward pass of the model with gradients"):
        kill_revive.step()


def test_all_modules_train_where_as_many_are_asked_for_and_that_is_said():
    with pytest.warns(UserWarning, match="active=16, and the model has 9 modules: all of them train, and nothing"):
        model, optimizer, kill_revive = prepared(active=16)
    train(model, optimizer, kill_revive, 0, 4)
    assert len(kill_revive.active) == 9 and kill_revive.share == 1


def resume(state, **rule):
    """A new model and optimizer that go on from a saved state."""
    saved = torch.load(io.BytesIO(state), weights_only=True)
    model = adapt(lora(init_lora_weights="gaussian"))
    model.load_state_dict(saved["model"])
    optimizer = adam(model)
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer, KillRevive(model, optimizer, **{"active": 2, "interval": 3, **rule})


def save(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


@pytest.mark.quick(1)
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("rule", [{}, {"idle": "last", "warmup": 3}, {"choose": "redrawn"}, {"warmup": 2}], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(stop, rule):
    model, optimizer, kill_revive = prepared(**rule)
    train(model, optimizer, kill_revive, 0, 10)
    stopped = prepared(**rule)
    train(*stopped, 0, stop)
    resumed = resume(save(*stopped[:2]), **rule)
    assert resumed[2].active == stopped[2].active and resumed[2].steps == stop
    train(*resumed, stop, 10)
    assert_same(weights(resumed[0]), weights(model))
    activity, began = resumed[2].activity
    assert (activity == kill_revive.activity[0]).all()
    assert began.tolist() == ([0, 2, 5, 8] if rule.get("warmup") == 2 else [0, 3, 6, 9])


def test_a_state_that_is_loaded_later_is_followed():
    stopped = prepared()
    train(*stopped, 0, 5)
    model, optimizer, kill_revive = prepared(seed=0)
    saved = torch.load(io.BytesIO(save(*stopped[:2])), weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, kill_revive, 5, 10)
    train(*stopped, 5, 10)
    assert_same(weights(model), weights(stopped[0]))


def test_accelerate_saves_and_loads_the_state(tmp_path):
    found = []
    for stop in (None, 5):
        accelerator = Accelerator(cpu=True)
        model = adapt(lora(init_lora_weights="gaussian"))
        model, optimizer = accelerator.prepare(model, adam(model))
        kill_revive = KillRevive(model, optimizer, active=2, interval=3)
        train(model, optimizer, kill_revive, 0, stop or 10)
        found.append(weights(model))
        if stop:
            accelerator.save_state(tmp_path / "state")
            train(model, optimizer, kill_revive, stop, 7)
            accelerator.load_state(tmp_path / "state")
            train(model, optimizer, kill_revive, stop, 10)
            found.append(weights(model))
    assert_same(found[0], found[2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"active": 3}, "active was 2 in the run that is resumed, and is 3 now; give it as it was, or start afresh"),
        ({"interval": 4}, "interval was 3.0 .* is 4.0 now"),
        ({"idle": "last"}, "idle was 'probe' .* is 'last' now"),
    ],
)
def test_other_settings_are_refused_by_name(changed, message):
    stopped = prepared()
    with pytest.raises(ValueError, match=message):
        resume(save(*stopped[:2]), **changed)


def test_the_state_of_another_model_is_refused():
    stopped = prepared()
    model = adapt(lora(target_modules=["k_proj", "o_proj", "up_proj"], init_lora_weights="gaussian"))
    optimizer = adam(model)
    optimizer.param_groups[0]["kill_revive"] = stopped[1].param_groups[0]["kill_revive"]
    with pytest.raises(ValueError, match="names was .*q_proj.* in the run that is resumed"):
        KillRevive(model, optimizer, active=2, interval=3)
    assert all(p.requires_grad for p in model.parameters() if any(p is q for q in optimizer.param_groups[0]["params"]))


def test_a_damaged_state_is_refused():
    _, optimizer, kill_revive = prepared()
    held = optimizer.param_groups[0]["kill_revive"]
    optimizer.param_groups[0]["kill_revive"] = {name: value for name, value in held.items() if name != "activity"}
    with pytest.raises(ValueError, match="lacks .'activity'.; it is damaged"):
        kill_revive._saved.load(optimizer)


def test_an_optimizer_that_lacks_modules_is_refused():
    model = adapt(lora())
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "layers.0" in n], 0.1)
    with pytest.raises(ValueError, match="optimizer lacks parameters of 6 of 9 modules .e.g. model.layers.1.self_attn"):
        KillRevive(model, optimizer, active=2)


def test_a_second_one_takes_the_place_of_the_first():
    model, optimizer, first = prepared()
    train(model, optimizer, first, 0, 2)
    second = KillRevive(model, optimizer, active=3, interval=3, resume=False)
    assert len(second.names) == 9 and len(second.active) == 3
    with pytest.raises(ValueError, match="was closed; make another one"):
        first.step()


def test_closing_lets_everything_train_again():
    model, optimizer, kill_revive = prepared()
    before = {n for n, p in adapt(lora()).named_parameters() if p.requires_grad}
    with kill_revive:
        train(model, optimizer, kill_revive, 0, 3)
        assert {n for n, p in model.named_parameters() if p.requires_grad} < before
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    kill_revive.close()
    model(**batch()).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == before


def test_closing_between_the_passes_lets_everything_train_too():
    model, _, kill_revive = prepared()
    loss = model(**batch()).loss
    kill_revive.close()
    loss.backward()
    assert len([p for p in model.parameters() if p.requires_grad]) == 18


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_pass_without_the_adapter_revives_nothing(checkpointing):
    """PEFT makes all adapters trainable when such a pass ends; losses of preferences have one in every step."""
    plain, other = prepared(), prepared()
    train(*plain, 0, 4)
    model, optimizer, kill_revive = other
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    for step in range(4):
        with torch.no_grad(), model.disable_adapter():
            model(**batch(seed=9))
        loss = model(**batch(seed=step, n=1 + step % 3)).loss
        with torch.no_grad(), model.disable_adapter():
            model(**batch(seed=9))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        kill_revive.step()
        optimizer.zero_grad()
    assert_same(weights(model), weights(plain[0]))


@pytest.mark.parametrize("what", ["merged", "switched"])
def test_merging_or_switching_meanwhile_is_refused(what):
    model, _, kill_revive = prepared()
    if what == "merged":
        model.merge_adapter()
    else:
        model.add_adapter("other", lora()())
        model.set_adapter("other")
    with pytest.raises(ValueError, match=f"q_proj: adapter ..default.. was {what}.* while Kill-and-Revive trains it"):
        kill_revive.step()
    with pytest.raises(ValueError, match="undo that before training goes on"):
        model(**batch())


def test_evaluation_meanwhile_changes_nothing():
    plain, other = prepared(interval=2), prepared(interval=2)
    train(*plain, 0, 6)
    model, optimizer, kill_revive = other
    for step in range(6):
        train(model, optimizer, kill_revive, step, step + 1)
        with torch.no_grad():
            model.eval()(**batch())
        model.train()
    assert_same(weights(model), weights(plain[0]))


def test_a_copy_of_the_model_is_a_plain_one():
    model, optimizer, kill_revive = prepared()
    copied = copy.deepcopy(model)
    train(model, optimizer, kill_revive, 0, 4)
    copied(**batch()).loss.backward()
    file = io.BytesIO()
    torch.save(model, file)
    assert len(file.getvalue()) < 2e6  # neither an optimizer nor snapshots came along


def test_changes_are_told_by_name():
    told = []
    model, optimizer, kill_revive = prepared(
        interval=1, decide=Scripted([0, 3], [0, 3], [3, 4]), on_change=lambda *names: told.append(names), seed=0
    )
    names, first = kill_revive.names, set(kill_revive.state.active)
    assert told == [([name for index, name in enumerate(names) if index not in first], [])]
    train(model, optimizer, kill_revive, 0, 3)
    assert len(told) == 3  # the second decision changed nothing
    assert told[2] == ([names[0]], [names[4]])


def test_a_decision_made_elsewhere_is_checked():
    def nonsense(rule, state, observations):
        after, _, _ = decide(rule, state, Observations([None] * 9))
        return after, (0, 1), (2, 3)

    _, _, kill_revive = prepared(interval=1, choose="fixed", decide=nonsense)
    with pytest.raises(ValueError, match="return what rule.decide returns"):
        kill_revive.step()


def test_wrappers_whose_parameters_are_not_single_are_refused():
    model = adapt(lora())
    with pytest.raises(
        ValueError, match="model is wrapped in DataParallel, whose parameters .* cannot freeze one by one"
    ):
        KillRevive(nn.DataParallel(model), adam(model), active=2)
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    with pytest.raises(ValueError, match="model is wrapped in DeepSpeedEngine"):
        KillRevive(engine, adam(model), active=2)


@pytest.mark.slow
def test_a_compiled_model_trains_the_same():
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, optimizer, kill_revive = prepared(interval=1)
        kill_revive.close()
        runs = torch.compile(model, backend="eager") if compiled else model
        kill_revive = KillRevive(runs, optimizer, active=2, interval=2, resume=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(runs, optimizer, kill_revive, 0, 5)
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_tied_adapters_are_refused():
    base = TINY["llama"].build(tie_word_embeddings=True)
    config = lora(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config())
    with pytest.raises(ValueError, match="embed_tokens and lm_head share a trainable parameter"):
        KillRevive(model, adam(model), active=2)
