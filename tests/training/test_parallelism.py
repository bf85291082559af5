"""Ways of driving several processes that D2FT does not follow are refused by name, with what to do."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from d2ft_peft import D2FTTrainer
from tests.test_trainer import adapt, arguments, samples


def trainer_under(monkeypatch, tmp_path, kind, config=None, axes=None, **plugin):
    trainer = D2FTTrainer(model=adapt(**(config or {})), args=arguments(tmp_path), train_dataset=samples())
    state = trainer.accelerator.state
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **plugin)
    monkeypatch.setattr(state, "fsdp_plugin", plugin, raising=False)
    monkeypatch.setattr(state, "distributed_type", DistributedType(kind))
    monkeypatch.setattr(state, "parallelism_config", axes, raising=False)
    return trainer


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("DEEPSPEED", "D2FT does not run under DEEPSPEED: .* never run with it; for ZeRO-2 and ZeRO-3 take FSDP2"),
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
    ("config", "plugin", "says"),
    [
        ({}, {"activation_checkpointing": True}, "gradient_checkpointing=True"),
        ({"policy": "fewer_samples", "device_capacities": "auto"}, {}, "device_capacities='auto' does not run"),
        ({"cache_frozen": "cache", "policy": "fewer_samples"}, {}, "cache_frozen='cache' does not run under FSDP"),
        ({"backward_score": "fisher"}, {}, "score 'fisher' does not run under FSDP"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_on_shared_out_parameters_is_refused(monkeypatch, tmp_path, config, plugin, says):
    with pytest.raises(ValueError, match=says):
        trainer_under(monkeypatch, tmp_path, "FSDP", config, **plugin).train()


def test_fsdp_of_the_first_version_is_refused(monkeypatch, tmp_path):
    trainer = trainer_under(monkeypatch, tmp_path, "FSDP")
    monkeypatch.setattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
    with pytest.raises(ValueError, match="D2FT does not run under FSDP1, .*set fsdp_config={'version': 2}"):
        trainer.train()
