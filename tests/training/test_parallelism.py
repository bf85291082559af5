"""Ways of driving several processes that D2FT does not follow are refused by name, with what to do."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from d2ft_peft import D2FTTrainer
from tests.test_trainer import adapt, arguments, samples


def trainer_under(monkeypatch, tmp_path, kind, config=None, axes=None, zero_stage=1, **plugin):
    trainer = D2FTTrainer(model=adapt(**(config or {})), args=arguments(tmp_path), train_dataset=samples())
    state = trainer.accelerator.state
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **plugin)
    monkeypatch.setattr(state, "fsdp_plugin", plugin, raising=False)
    monkeypatch.setattr(state, "distributed_type", DistributedType(kind))
    monkeypatch.setattr(state, "parallelism_config", axes, raising=False)
    monkeypatch.setattr(type(state), "deepspeed_plugin", SimpleNamespace(zero_stage=zero_stage))
    monkeypatch.setattr(trainer.accelerator, "deepspeed_engine_wrapped", None, raising=False)
    return trainer


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("MEGATRON_LM", "D2FT does not run under MEGATRON_LM: it replaces the model"),
        ("XLA", "D2FT does not run under XLA: it traces a step once"),
        ("MULTI_NPU", "D2FT does not run under MULTI_NPU: use DistributedDataParallel or FSDP2"),
    ],
)
def test_other_engines_are_refused(monkeypatch, tmp_path, kind, says):
    with pytest.raises(ValueError, match=says):
        trainer_under(monkeypatch, tmp_path, kind).train()


@pytest.mark.parametrize(
    ("axis", "says"),
    [
        ("tp_enabled", r"tensor parallelism \(parallelism_config\): .*head_parallel=True shares"),
        ("cp_enabled", "context parallelism .* a part of each sequence"),
        ("sp_enabled", "sequence parallelism .* a part of each sequence"),
    ],
)
def test_axes_that_cut_samples_or_weights_are_refused(monkeypatch, tmp_path, axis, says):
    with pytest.raises(ValueError, match=f"D2FT does not run under {says}"):
        trainer_under(monkeypatch, tmp_path, "MULTI_CPU", axes=SimpleNamespace(**{axis: True})).train()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"policy": "fewer_samples", "device_capacities": "auto"}, "device_capacities='auto' does not run under {}"),
        ({"cache_frozen": "cache", "policy": "fewer_samples"}, "cache_frozen='cache' does not run under {}"),
        ({"backward_score": "fisher"}, "score 'fisher' does not run under {}"),
    ],
)
@pytest.mark.parametrize(("kind", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_what_cannot_be_done_where_processes_meet_is_refused(monkeypatch, tmp_path, kind, name, config, says):
    trainer = trainer_under(monkeypatch, tmp_path, kind, config)
    with pytest.raises(ValueError, match=says.format(name)):
        trainer.train()


def test_checkpointing_by_the_plugin_is_refused(monkeypatch, tmp_path):
    trainer = trainer_under(monkeypatch, tmp_path, "FSDP", activation_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=True"):
        trainer.train()


@pytest.mark.parametrize("policy", ["random", "lisa", "depth"])
def test_heads_are_refused_where_weights_are_gathered_one_by_one(monkeypatch, tmp_path, policy):
    config = {"policy": policy, "compute_budget": 0.5}
    trainer = trainer_under(monkeypatch, tmp_path, "DEEPSPEED", config, zero_stage=3)
    with pytest.raises(ValueError, match=f"policy='{policy}' does not run under ZeRO-3, .* ZeRO-2, or FSDP2"):
        trainer.train()


def test_an_engine_that_ended_is_refused(monkeypatch, tmp_path):
    trainer = trainer_under(monkeypatch, tmp_path, "DEEPSPEED")
    trainer.model_wrapped = SimpleNamespace()
    with pytest.raises(ValueError, match="DeepSpeed's engine ended with the first call of train"):
        trainer.train()


def test_a_model_that_was_loaded_in_parts_is_refused(monkeypatch, tmp_path):
    trainer = trainer_under(monkeypatch, tmp_path, "MULTI_CPU")
    monkeypatch.setattr(trainer.model, "is_distributed_loading_by_transformers", True)
    with pytest.raises(ValueError, match="loaded in parts .*load it whole; .*fsdp=True"):
        trainer.train()


def test_fsdp_of_the_first_version_is_refused(monkeypatch, tmp_path):
    trainer = trainer_under(monkeypatch, tmp_path, "FSDP")
    monkeypatch.setattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
    with pytest.raises(ValueError, match="D2FT does not run under FSDP1, .*set fsdp_config={'version': 2}"):
        trainer.train()
