"""What the package relies on in transformers, PEFT, Accelerate and torch beyond their documented interfaces.

A name that is gone, or takes other arguments, is to be seen here by its name, not as a crash somewhere in training.
"""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import GradientState
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Cache, DynamicCache, PreTrainedModel, Trainer, TrainingArguments
from transformers.cache_utils import DynamicLayer
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

import d2ft_peft
from d2ft_peft import D2FTConfig, D2FTLoraModel, D2FTModel, D2FTTrainerMixin
from d2ft_peft.dlora.edge.edge_model import EdgeModel
from d2ft_peft.dlora.edge.skeleton import _LoadsOwn
from d2ft_peft.head_parallel.storage.loading import _LoadsParts
from d2ft_peft.training.head_parallel_engine import _HeadParallelism
from d2ft_peft.tuners.layer import D2FTLayer


PACKAGE = Path(d2ft_peft.__file__).parent
OVERRIDES = {
    D2FTTrainerMixin: (Trainer, {
        "_build_accelerator_args", "_inner_training_loop", "_get_dataloader", "_prepare_for_training",
        "create_optimizer", "get_batch_samples", "_prepare_inputs", "training_step", "floating_point_ops",
        "_track_num_input_tokens", "_clip_grad_norm", "_get_grad_norm", "log", "evaluation_loop", "_save",
        "_save_optimizer_and_scheduler", "_save_rng_state", "_push_from_checkpoint", "_load_rng_state",
        "_load_from_checkpoint", "_load_best_model", "_load_optimizer_and_scheduler",
    }),
    D2FTModel: (BaseTuner, {
        "inject_adapter", "set_adapter", "delete_adapter", "unload", "disable_adapter_layers",
        "_prepare_adapter_config", "_unload_and_optionally_merge", "_check_target_module_exists",
        "_check_merge_allowed", "_create_and_replace", "_replace_module", "_cast_adapter_dtype",
        "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load", "_get_adapter_state_dict",
    }),
    D2FTLoraModel: (LoraModel, {
        "inject_adapter", "set_adapter", "delete_adapter", "_prepare_adapter_config", "_unload_and_optionally_merge",
        "_convert_state_dict_for_initial_model",
    }),
    D2FTLayer: (BaseTunerLayer, {"merge", "unmerge", "supports_lora_conversion"}),
    D2FTConfig: (PeftConfig, {"to_dict", "save_pretrained", "from_pretrained"}),
    _HeadParallelism: (ParallelismConfig, {"_validate_accelerator"}),
    _LoadsParts: (PreTrainedModel, {"_load_pretrained_model"}),
    _LoadsOwn: (PreTrainedModel, {"_load_pretrained_model"}),
    EdgeModel: (PeftModel, {
        "add_adapter", "load_adapter", "save_pretrained",
    }),
}  # fmt: skip
"""What ours puts before theirs, by class: (theirs, names)."""

CALLS = [
    (Trainer._remove_unused_columns, "self dataset", "description"),
    (Trainer._get_collator_with_removed_columns, "self collator", "description"),
    (Trainer._save_rng_state, "self folder", ""),
    (Trainer._load_rng_state, "self checkpoint", ""),
    (Trainer._load_best_model, "self", ""),
    (Trainer._clip_grad_norm, "self model", ""),
    (Trainer._get_grad_norm, "self model known", ""),
    (Trainer._get_num_items_in_batch, "self batches device", ""),
    (Trainer.training_step, "self model inputs items", ""),
    (Trainer.compute_loss, "self model inputs", "return_outputs num_items_in_batch"),
    (Trainer._save, "self folder state_dict", ""),
    (Trainer._save_optimizer_and_scheduler, "self folder", ""),
    (Trainer._load_optimizer_and_scheduler, "self checkpoint", ""),
    (Trainer._load_from_checkpoint, "self checkpoint model", ""),
    (Trainer._push_from_checkpoint, "self folder", ""),
    (Trainer._get_output_dir, "self", "trial"),
    (Trainer._track_num_input_tokens, "self inputs", ""),
    (Trainer.log, "self logs start_time", ""),
    (GradientState._set_sync_gradients, "self flag", ""),
    (check_adapters_to_merge, "module names", ""),
    (check_target_module_exists, "config key", ""),
    (PeftModel.save_pretrained, "self folder", ""),
    (LoraModel.subtract_mutated_init, "self state_dict name kwargs", ""),
    (BaseTuner._cast_adapter_dtype, "self name", "autocast_adapter_dtype"),
    (BaseTuner._remap_adapter_state_dict_for_load.__func__, "cls model config name state_dict", ""),
    (get_device_states, "tensor", ""),
    (set_device_states, "devices states", ""),
    (cached_file, "base name", "revision _raise_exceptions_for_missing_entries"),
    (get_checkpoint_shard_files, "base index", "revision"),
    (DynamicCache.batch_select_indices, "self indices", ""),
    (DynamicCache.crop, "self tokens", ""),
    (Variable._execution_engine.queue_callback, "callback", ""),
    (DistributedDataParallel._build_params_for_reducer, "self", ""),
    (DistributedDataParallel._build_debug_param_to_name_mapping, "self parameters", ""),
    (DistributedDataParallel._ddp_init_helper, "self parameters sparse names static_graph", ""),
    (torch.distributed._register_comm_hook, "reducer state hook", ""),
]
"""What we call: (function, names of the arguments that are given by position, names of those given by name)."""

ARGUMENTS = [
    (Trainer, ["loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "compute_loss_func", "label_smoother",
               "current_gradient_accumulation_steps", "current_flos"]),
    (TrainingArguments, ["average_tokens_across_devices", "accelerator_config", "ddp_find_unused_parameters",
                         "ddp_broadcast_buffers", "ddp_timeout", "auto_find_batch_size"]),
    (DistributedDataParallel, ["_comm_hooks", "_static_graph_delay_allreduce_enqueued", "static_graph",
                               "_ddp_params_and_buffers_to_ignore"]),
    (PreTrainedModel, ["_gradient_checkpointing_func", "_keys_to_ignore_on_load_unexpected", "main_input_name",
                       "_loss_function"]),
    (DynamicLayer, ["keys", "values"]),
    (Cache, ["layers"]),
    (BaseTunerLayer, ["disable_adapters", "active_adapters", "merged"]),
    (LoraConfig, ["fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules"]),
]  # fmt: skip
"""Names that are read from a class's instances, and must be set by its code."""


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NOT_CALLED_BY_THEM = {"planner", "weight", "bias", "forward"}


def called(cls: type, name: str) -> inspect.Signature:
    """The signature of a method as its callers see it, without ``self``."""
    method = inspect.getattr_static(cls, name)
    signature = inspect.signature(getattr(cls, name))
    if isinstance(method, (classmethod, staticmethod)):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def binds(signature: inspect.Signature, by_position: list[str], by_name: list[str]) -> bool:
    try:
        signature.bind(*by_position, **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("d2ft_peft.")


def methods(cls: type) -> set[str]:
    """What a class of ours defines itself, in all of its bases that are ours."""
    own = [vars(base).items() for base in cls.__mro__ if is_ours(base)]
    return {name for items in own for name, value in items if callable(value) or isinstance(value, classmethod)}


def test_every_module_finds_what_it_imports():
    files = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert files
    for file in sorted(files):
        importlib.import_module(".".join(file.parts).removesuffix(".__init__"))


@pytest.mark.parametrize("ours", OVERRIDES)
def test_what_we_override_exists(ours):
    theirs, listed = OVERRIDES[ours]
    assert not [name for name in sorted(listed) if not callable(getattr(theirs, name, None))]
    assert not listed - methods(ours)


@pytest.mark.parametrize("ours", OVERRIDES)
def test_all_that_we_override_is_listed(ours):
    theirs, listed = OVERRIDES[ours]
    shared = {name for name in methods(ours) if hasattr(theirs, name) and not name.startswith("__")}
    assert not shared - listed - _NOT_CALLED_BY_THEM


@pytest.mark.parametrize("ours", OVERRIDES)
def test_what_we_override_takes_the_arguments_of_theirs(ours):
    theirs, listed = OVERRIDES[ours]
    for name in sorted(listed):
        expected = called(theirs, name)
        by_position = [p.name for p in expected.parameters.values() if p.kind in _POSITIONAL]
        by_name = [p.name for p in expected.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        assert binds(called(ours, name), by_position, by_name), f"{theirs.__name__}.{name}{expected}"


@pytest.mark.parametrize(
    ("function", "by_position", "by_name"), CALLS, ids=lambda value: getattr(value, "__name__", "")
)
def test_what_we_call_takes_our_arguments(function, by_position, by_name):
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # of C++, which is called in the lifecycle
    assert binds(signature, by_position.split(), by_name.split()), f"{function.__qualname__}{signature}"


@pytest.mark.parametrize(("cls", "attributes"), ARGUMENTS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_we_read_is_set(cls, attributes):
    source = inspect.getsource(inspect.getmodule(cls))
    assert not [name for name in attributes if name not in source]


def test_peft_looks_methods_up_where_we_register():
    for kind, tuner in (("D2FT", D2FTModel), ("D2FT_LORA", D2FTLoraModel)):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is D2FTConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is tuner
        assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == tuner.prefix


def test_a_trainer_that_lacks_a_name_is_refused(monkeypatch):
    monkeypatch.delattr(Trainer, "_track_num_input_tokens")
    with pytest.raises(TypeError, match="has no Trainer._track_num_input_tokens, which D2FT builds on"):
        type("Mine", (D2FTTrainerMixin, Trainer), {})


def test_torch_says_whether_a_backward_pass_runs():
    seen = []
    x = torch.ones((), requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch._C._current_graph_task_id()))
    (x * 1).backward()
    assert torch._C._current_graph_task_id() == -1 and seen[0] != -1
