"""What a PEFT user expects of an adapted model: every verb of PEFT, on every architecture and in every mode."""

import copy
from dataclasses import dataclass

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY
from tests.tuners.cases import (
    CASES,
    MODULES_TO_SAVE,
    SOME_TARGETS,
    adapted,
    assert_plain,
    close,
    config_for,
    differs,
    each_mode,
    fresh,
    interceptions,
    logits,
    mixed_row,
    plain_model,
    same,
    state,
    train_briefly,
    trainable,
    trained,
)


SPLITS = (".d2ft_layers.", ".lora_A.", ".lora_B.", ".modules_to_save.")


def adapted_modules(model) -> set[str]:
    """Paths, in the plain model, of the modules that train."""
    names = set()
    for name in trainable(model):
        split = next(s for s in SPLITS if s in name)
        names.add(name.partition(split)[0].removeprefix("base_model.model."))
    return names


def plan_for(model, adapter="default", seed=0):
    partition = get_runtime(model).partitions[adapter]
    return compile_plan(partition, mixed_row(partition, seed))


@dataclass(frozen=True)
class Case:
    """One row of the table: an adapted model before and after a little training. Tests that change it copy it."""

    name: str
    mode: str
    model: nn.Module
    untrained_state: dict[str, torch.Tensor]
    untrained: torch.Tensor
    trained: torch.Tensor

    @property
    def plain(self) -> nn.Module:
        return plain_model(self.name)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> Case:
    name, mode = request.param
    model = adapted(name, mode)
    untrained_state, untrained = state(model), logits(model, name)
    train_briefly(model, name)
    return Case(name, mode, model, untrained_state, untrained, logits(model, name))


@pytest.mark.quick(5)
def test_an_untrained_adapter_changes_nothing(case):
    same(case.untrained, logits(case.plain, case.name))


def test_only_the_adapter_trains(case):
    partition = partition_model(case.plain)
    expected = set(partition.projections) | (set(partition.boundary) if case.mode == "boundary" else set())
    assert adapted_modules(case.model) == expected


def test_training_moves_the_adapter_and_not_the_base(case):
    for parameter_name, parameter in case.model.named_parameters():
        if not parameter.requires_grad:
            same(parameter, case.untrained_state[parameter_name])
    differs(case.trained, case.untrained)


def test_disable_adapter(case):
    with case.model.disable_adapter():
        same(logits(case.model, case.name), case.untrained)
    same(logits(case.model, case.name), case.trained)


@pytest.mark.quick(5)
def test_merge_and_unmerge(case):
    model = case.copy()
    before = state(model)
    model.merge_adapter()
    close(logits(model, case.name), case.trained)
    model.unmerge_adapter()
    close(logits(model, case.name), case.trained)
    for key, value in model.state_dict().items():
        close(value, before[key])


@each_mode
def test_disabling_a_merged_adapter_unmerges_it(mode):
    model = trained("vit", mode)
    model.merge_adapter()
    with model.disable_adapter():
        close(logits(model, "vit"), logits(plain_model("vit"), "vit"))


@pytest.mark.quick(5)
def test_merge_and_unload_gives_the_plain_model(case):
    model = case.copy()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    train_briefly(model, case.name)
    expected = logits(model, case.name)
    merged = model.merge_and_unload()
    assert type(merged) is TINY[case.name].model
    assert list(merged.state_dict()) == list(case.plain.state_dict())
    assert_plain(merged)
    close(logits(merged, case.name), expected)


@pytest.mark.quick(5)
def test_unload_gives_the_base_back(case):
    base = case.copy().unload()
    assert_plain(base)
    assert list(base.state_dict()) == list(case.plain.state_dict())
    for key, value in case.plain.state_dict().items():
        same(base.state_dict()[key], value)
    same(logits(base, case.name), case.untrained)


@pytest.mark.parametrize("name, mode", [*((name, "lora") for name in TINY), ("vit", "full"), ("bert", "boundary")])
def test_modules_to_save_train_besides(name, mode):
    model = adapted(name, mode, modules_to_save=MODULES_TO_SAVE[name])
    copies = {n for n in trainable(model) if f"{MODULES_TO_SAVE[name][0]}.modules_to_save.default." in n}
    assert copies and not any(f"{MODULES_TO_SAVE[name][0]}.d2ft_layers" in n for n in trainable(model))
    before = state(model)
    train_briefly(model, name)
    assert all(not torch.equal(model.state_dict()[n], before[n]) for n in copies)
    with model.disable_adapter():
        same(logits(model, name), logits(plain_model(name), name))


def test_print_trainable_parameters(capsys):
    adapted("vit", "full").print_trainable_parameters()
    projections = partition_model(plain_model("vit")).projections
    own = sum(p.numel() for n, p in plain_model("vit").named_parameters() if n.rpartition(".")[0] in projections)
    assert f"trainable params: {own:,}" in capsys.readouterr().out


def test_safe_merge_refuses_infinities():
    model = adapted("vit", "full")
    next(iter(trainable(model).values())).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("name, mode", [("llama", "full"), ("llama", "lora"), ("bert", "boundary")])
def test_several_adapters(name, mode):
    model = trained(name, mode)
    first = logits(model, name)
    model.add_adapter("other", config_for(mode, heads_per_subnet=2, target_modules=SOME_TARGETS[name]))
    same(logits(model, name), first)

    model.set_adapter("other")
    same(logits(model, name), logits(plain_model(name), name))
    partitions = get_runtime(model).partitions
    assert partitions["default"].num_scheduled == 2 * partitions["other"].num_scheduled
    train_briefly(model, name, adapter="other")
    second = logits(model, name)
    assert not any(".default." in parameter for parameter in trainable(model))

    model.set_adapter("default")
    same(logits(model, name), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    same(logits(model, name), second)
    train_briefly(model, name, adapter="other")


def test_deleting_the_active_adapter_activates_the_next():
    model = trained("vit", "full")
    first = logits(model, "vit")
    model.add_adapter("other", config_for("full", shortcut="mean"))
    model.set_adapter("other")
    assert get_runtime(model).shortcut == "mean"
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert list(get_runtime(model).partitions) == ["default"]
    assert get_runtime(model).shortcut == "zero"
    same(logits(model, "vit"), first)


def test_the_shortcut_is_that_of_the_active_adapter():
    model = adapted("vit", "lora", shortcut="rescale")
    model.add_adapter("other", config_for("lora", shortcut="mean"))
    runtime = get_runtime(model)
    assert (runtime.shortcut, len(runtime.means)) == ("rescale", 0)
    model.set_adapter("other")
    assert (runtime.shortcut, len(runtime.means)) == ("mean", 6)
    model.set_adapter("default")
    assert (runtime.shortcut, len(runtime.means)) == ("rescale", 0)


def test_two_full_copies_cannot_run_together():
    model = adapted("vit", "full")
    model.add_adapter("other", config_for("full"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"adapters \['default', 'other'\] are active"):
        logits(model, "vit")


def test_an_adapter_cannot_be_added_to_merged_weights():
    model = adapted("vit", "full")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter 'other' cannot be added while \['default'\] is merged"):
        model.add_adapter("other", config_for("full"))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"heads_per_subnet": 3}, "heads_per_subnet=3 does not divide"),
        ({"layers_to_transform": [3]}, r"layers_to_transform=\[3\] must name blocks from 0 to 2"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_refused_adapter_leaves_the_others_working(mode, bad, message):
    model = trained("vit", mode)
    expected, intercepted = logits(model, "vit"), len(interceptions(model))
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", config_for(mode, **bad))
    assert len(interceptions(model)) == intercepted
    assert list(get_runtime(model).partitions) == ["default"]
    same(logits(model, "vit"), expected)
    train_briefly(model, "vit")


@pytest.mark.parametrize("name, mode", [*((name, "boundary") for name in TINY), ("vit", "lora"), ("llama", "lora")])
def test_layers_to_transform(name, mode):
    blocks = partition_model(plain_model(name)).blocks
    modules = adapted_modules(adapted(name, mode, layers_to_transform=[0, 2]))
    inside = {index for index, block in enumerate(blocks) if any(m.startswith(f"{block}.") for m in modules)}
    outside = {m for m in modules if not m.startswith(tuple(f"{block}." for block in blocks))}
    assert inside == {0, 2}
    assert bool(outside) == (mode == "boundary")


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("layers", [1, [1, 2]])
def test_layers_to_transform_without_a_task_head(mode, layers):
    """Paths of a bare model begin with the stack of blocks, where PEFT looks for no index."""
    model = get_peft_model(fresh("llama").model, config_for(mode, layers_to_transform=layers))
    expected = {layers} if isinstance(layers, int) else set(layers)
    assert {int(module.split(".")[1]) for module in adapted_modules(model)} == expected
    assert len(adapted_modules(model)) == 7 * len(expected)


def test_exclude_modules_hold_for_the_boundary_too():
    modules = adapted_modules(adapted("llama", "boundary", exclude_modules=["q_proj", "embed_tokens"]))
    assert not any(m.endswith(("q_proj", "embed_tokens")) for m in modules)
    assert any(m.endswith("k_proj") for m in modules) and "lm_head" in modules


def test_target_modules_and_the_boundary_add_up():
    modules = adapted_modules(adapted("llama", "boundary", target_modules=["v_proj"]))
    partition = partition_model(plain_model("llama"))
    assert modules == set(partition.boundary) | {p for p in partition.projections if p.endswith("v_proj")}


def test_modules_outside_the_subnets_can_be_targets():
    model = adapted("llama", "lora", target_modules="all-linear")
    assert {m.split(".")[-1] for m in adapted_modules(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert "lm_head" in adapted_modules(adapted("llama", "lora", target_modules=["v_proj", "lm_head"]))


@each_mode
def test_a_copy_is_independent(mode):
    model = trained("llama", mode)
    expected = logits(model, "llama")
    twin = copy.deepcopy(model)
    assert get_runtime(twin) is not get_runtime(model)
    assert twin.base_model.runtime is get_runtime(twin)
    modules = set(twin.modules())
    assert all(i.module in modules and i.runtime is get_runtime(twin) for i in interceptions(twin))
    train_briefly(twin, "llama")
    differs(logits(twin, "llama"), expected)
    same(logits(model, "llama"), expected)


@each_mode
def test_a_whole_model_survives_torch_save(mode, tmp_path):
    model = trained("bert", mode)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    same(logits(loaded, "bert"), logits(model, "bert"))
    assert len(interceptions(loaded)) == len(interceptions(model))
    train_briefly(loaded, "bert")
    train_briefly(model, "bert")
    same(logits(loaded, "bert"), logits(model, "bert"))


@each_mode
def test_interceptions_leave_the_state_dict_alone(mode):
    model = adapted("vit", mode)
    intercepted = list(model.state_dict())
    model.base_model._remove_interceptions()
    assert not interceptions(model)
    assert list(model.state_dict()) == intercepted
    assert not any("forward" in key or "runtime" in key for key in intercepted)


@each_mode
def test_inject_adapter_in_model(mode):
    model = inject_adapter_in_model(config_for(mode), fresh("llama"))
    assert type(model) is TINY["llama"].model
    same(logits(model, "llama"), logits(plain_model("llama"), "llama"))
    train_briefly(model, "llama")
    differs(logits(model, "llama"), logits(plain_model("llama"), "llama"))


def test_injecting_twice_keeps_one_runtime():
    model = inject_adapter_in_model(config_for("lora"), fresh("llama"), adapter_name="a")
    runtime = get_runtime(model)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model = inject_adapter_in_model(config_for("lora", heads_per_subnet=2), model, adapter_name="b")
    assert get_runtime(model) is runtime
    assert [p.heads_per_subnet for p in runtime.partitions.values()] == [1, 2]
    assert len({id(i.module) for i in interceptions(model)}) == len(interceptions(model))


def test_a_model_without_d2ft_has_no_runtime():
    with pytest.raises(ValueError, match="ViTForImageClassification is not a D2FT model; wrap it with get_peft_model"):
        get_runtime(plain_model("vit"))


@each_mode
def test_evaluation_is_all_full_even_under_a_plan(mode):
    model = trained("llama", mode)
    expected = logits(model, "llama")
    with get_runtime(model).use(plan_for(model)):
        same(logits(model, "llama"), expected)
        differs(model.train()(**TINY["llama"].batch()).logits.detach(), expected)


@each_mode
def test_training_without_a_plan_warns_once_and_is_all_full(mode):
    model = adapted("llama", mode).train()
    with pytest.warns(UserWarning, match="training forward without a schedule"):
        outputs = model(**TINY["llama"].batch())
    same(outputs.logits, logits(plain_model("llama"), "llama"))
    model.train()(**TINY["llama"].batch())


def test_training_without_a_plan_is_an_error_under_a_trainer():
    model = adapted("llama", "full").train()
    get_runtime(model).driven = True
    with pytest.raises(RuntimeError, match="without a plan although a D2FT trainer drives it"):
        model(**TINY["llama"].batch())
    logits(model, "llama")


def test_boundary_modules_with_projections_inside_are_refused():
    model = fresh("vit")
    model.vit.layers[0].scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="train_boundary=True cannot copy 'vit.layers.0'"):
        get_peft_model(model, config_for("boundary"))


@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].kind == "causal"])
def test_tied_weights_stay_tied(name):
    """The copies of tied weights are one parameter, and merging leaves the model tied."""
    model = get_peft_model(fresh(name, tie_word_embeddings=True), config_for("boundary"))
    train_briefly(model, name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    assert embedding.weight.requires_grad
    merged = model.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings


def test_the_partition_of_an_adapted_model_is_that_of_the_plain_one(case):
    assert partition_model(case.model.get_base_model()) == partition_model(case.plain)


def test_targets_are_written_into_the_config():
    assert adapted("llama", "full").peft_config["default"].target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert D2FTConfig().target_modules is None
    assert adapted("gpt2", "lora").peft_config["default"].fan_in_fan_out
