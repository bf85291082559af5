"""Models of which each process reads its own heads: the same parts as those of a whole model that is cut."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, core_model_loading
from transformers.models.auto import auto_factory

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.head_parallel import HeadParallel, load_head_parallel
from d2ft_peft.head_parallel.storage import loading
from tests.distributed.head_parallel import join
from tests.distributed.launch import run
from tests.distributed.test_head_parallel_use import message
from tests.models import TINY


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

# The name of the model, the configuration, and what `from_pretrained` is told besides.
CASES = [
    ("vit", {"train_boundary": True, "heads_per_subnet": 2}, {}),
    ("llama", {"r": 4}, {"torch_dtype": torch.bfloat16}),
    ("gpt2", {"r": 4}, {}),
    ("gpt2", {}, {}),
    ("qwen3", {}, {}),
    # A new task head, as for another data set.
    ("bert", {"modules_to_save": ["classifier"]}, {"num_labels": 3, "ignore_mismatched_sizes": True}),
]


def saved(folder: Path) -> None:
    """Write every model; one of them in several files."""
    for name in {name for name, *_ in CASES}:
        size = "30KB" if name == "llama" else "1GB"
        TINY[name].build().save_pretrained(folder / name, max_shard_size=size)
    with_old_names(folder / "vit" / "model.safetensors")
    model = TINY["vit"].build()
    state = {key.replace("mlp.fc1", "mlp.other"): value for key, value in model.state_dict().items()}
    model.save_pretrained(folder / "incomplete", state_dict=state)
    for name in ("lost", "cut"):
        shutil.copytree(folder / "llama", folder / name)
        second = sorted((folder / name).glob("*.safetensors"))[1]
        whole = second.read_bytes()
        second.unlink()
        if name == "cut":
            second.write_bytes(whole[: len(whole) // 2])
    (folder / "pickle").mkdir()
    model.config.save_pretrained(folder / "pickle")
    torch.save(model.state_dict(), folder / "pickle" / "pytorch_model.bin")


# What ViT's weights are called in the checkpoints on the Hub.
OLD_NAMES = {
    "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip


def with_old_names(path: Path) -> None:
    state = {}
    for key, value in load_file(path).items():
        for new, old in OLD_NAMES.items():
            key = key.replace(new, old)
        state[key] = value
    assert any("encoder.layer.2.attention.attention.query" in key for key in state)
    save_file(state, path, {"format": "pt"})


def on_ranks(folder: str) -> dict:
    """Names of parameters that differ from those of the whole model's part, and bytes that were read."""
    join()
    folder, differing, count = Path(folder), [], []
    for name, config, kwargs in CASES:
        config = {"head_parallel": True, "num_full": 1, **config}
        read = 0
        part = loading._Part.__getitem__

        def counted(self, index, part=part):
            nonlocal read
            tensor = part(self, index)
            read += tensor.nbytes
            return tensor

        loading._Part.__getitem__ = counted
        model_class = AutoModelForSequenceClassification if name == "bert" else TINY[name].model
        torch.manual_seed(3)
        ours = load_head_parallel(model_class, str(folder / name), D2FTConfig(**config), **kwargs)
        loading._Part.__getitem__ = part
        torch.manual_seed(3)
        whole = get_peft_model(model_class.from_pretrained(folder / name, **kwargs), D2FTConfig(**config))
        held = {id(p): p.nbytes for p in ours.parameters()}
        size = sum(p.nbytes for p in whole.parameters())
        batches = [TINY[name].batch(2, seed) for seed in (1, 2)]
        for batch in batches:
            batch["labels"] %= 3
        losses = [HeadParallel(model.train()).forward_backward(batches).item() for model in (ours, whole)]
        assert type(ours.get_base_model()) is type(whole.get_base_model())
        mine, theirs = dict(ours.named_parameters()), dict(whole.named_parameters())
        buffers = dict(ours.named_buffers()), dict(whole.named_buffers())
        assert mine.keys() == theirs.keys() and buffers[0].keys() == buffers[1].keys()
        pairs = {**{k: (mine[k], theirs[k]) for k in mine}, **{k: (buffers[0][k], buffers[1][k]) for k in buffers[0]}}
        differing.append([k for k, (a, b) in pairs.items() if not (a.dtype == b.dtype and torch.equal(a, b))])
        flags = [k for k in mine if mine[k].requires_grad != theirs[k].requires_grad]
        count.append({"read": read, "held": sum(held.values()), "whole": size, "flags": flags, "losses": losses})
    return {"differing": differing, "count": count, "errors": errors(folder)}


def errors(folder: Path) -> dict[str, str]:
    """What is said to what cannot be loaded in parts."""

    def load(name="vit", **config):
        kind = "llama" if name in ("lost", "cut") else "vit"
        load_head_parallel(TINY[kind].model, str(folder / name), D2FTConfig(**{"head_parallel": True, **config}))

    def load_without_helper():
        helper = core_model_loading.rename_source_key
        del core_model_loading.rename_source_key
        try:
            load()
        finally:
            core_model_loading.rename_source_key = helper

    def score():
        model = load_head_parallel(
            TINY["vit"].model, str(folder / "vit"), D2FTConfig(head_parallel=True, backward_score="fisher")
        )
        HeadParallel(model, before_cut=lambda planner: None)

    return {
        "not asked for": message(lambda: load(head_parallel=False)),
        "initialization": message(lambda: load(r=2, init_lora_weights="pissa")),
        "missing": message(lambda: load("incomplete")),
        "pickle": message(lambda: load("pickle")),
        "lost": message(lambda: load("lost")),
        "cut": message(lambda: load("cut")),
        "helper": message(load_without_helper),
        "scores": message(score),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    saved(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, folder):
    return run(__name__, "on_ranks", tmp_path_factory.mktemp("two"), str(folder), processes=2)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{name}, {config}" for name, config, _ in CASES])
def test_what_is_loaded_is_the_part_of_the_whole_model(two_ranks, index):
    for of_rank in two_ranks:
        assert of_rank["differing"][index] == [] == of_rank["count"][index]["flags"]
        loss, expected = of_rank["count"][index]["losses"]
        assert loss == expected > 0


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{name}, {config}" for name, config, _ in CASES])
def test_a_rank_reads_its_own_heads_only(two_ranks, index):
    name = CASES[index][0]
    model = TINY[name].build()
    partition = partition_model(model)
    whole = 0
    for branch in partition.branches:
        for projection in branch.projections:
            module = model.get_submodule(projection.name)
            whole += module.weight.nbytes
            whole += module.bias.nbytes if module.bias is not None and projection.kind == "column" else 0
    for of_rank in two_ranks:
        assert of_rank["count"][index]["read"] == whole // 2
        assert of_rank["count"][index]["held"] < of_rank["count"][index]["whole"]


@pytest.mark.parametrize(
    ("what", "says"),
    {
        "not asked for": "ValueError: head_parallel=False: a model is loaded in parts for",
        "initialization": "ValueError: init_lora_weights='pissa' looks at whole weights",
        "missing": "ValueError: .*incomplete' does not fit ViTForImageClassification: 6 weights of projections",
        "pickle": "ValueError: .*pickle' has no weights in safetensors",
        "lost": r"ValueError: '.*lost/model-00002-of-0000\d.safetensors' is missing",
        "cut": r"ValueError: '.*cut/model-00002-of-0000\d.safetensors' is damaged, or only a part of it was written",
        "helper": "ImportError: load_head_parallel uses transformers.core_model_loading.rename_source_key, which",
        "scores": "ValueError: the scores fisher take a pass over the data on the whole model",
    }.items(),
)
def test_errors_say_what_cannot_be_loaded(two_ranks, what, says):
    for of_rank in two_ranks:
        assert re.match(says, of_rank["errors"][what]), of_rank["errors"][what]


def test_importing_needs_no_private_helper_of_transformers(monkeypatch):
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    monkeypatch.delattr(auto_factory, "_get_model_class")
    spec = importlib.util.find_spec(loading.__name__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
