"""What the code of a page takes as given: a model, data, a loop's batches. Pages say in words what these are.

`GIVEN` holds, by page, what is given anew before its blocks, by their number; names that a block makes stay for later
ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import d2ft_peft
from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer
from d2ft_peft.dlora import BaseModel, Certificates, Cloud, connect
from d2ft_peft.head_parallel import HeadParallel, load_head_parallel
from tests.dlora.certificates import Authority
from tests.models import TINY
from tests.whole_models import WHOLE


Given = dict[str, Any]
REPLACED = "replaced"  # what stands for addresses, folders and numbers that are the reader's
_SMALL = {"use_cpu": True, "max_steps": 2, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4}


def everywhere() -> Given:
    """Names that readers import without being told."""
    names = {name: getattr(d2ft_peft, name) for name in d2ft_peft.__all__}
    names |= {"LoraConfig": LoraConfig, "PeftModel": PeftModel, "get_peft_model": get_peft_model, "torch": torch}
    return {**names, "Trainer": Trainer, "TrainingArguments": partial(TrainingArguments, **_SMALL)}


def items(name: str = "vit", count: int = 24) -> list[dict[str, torch.Tensor]]:
    batch = TINY[name].batch(count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def adapted(name: str = "vit", **config: Any) -> torch.nn.Module:
    return get_peft_model(TINY[name].build(), D2FTConfig(**config))


def plain(folder: Path) -> Given:
    return {"model": TINY["vit"].build(), "data": items(), "collator": default_data_collator}


def saved_lora(folder: Path) -> Given:
    adapted(r=4).save_pretrained(folder / "lora")
    return {"folder": str(folder / "lora"), "base": TINY["vit"].build()}


def head(folder: Path) -> Given:
    return {"model": adapted(modules_to_save=["classifier"]), "loader": [TINY["vit"].batch(20)]}


def kill_revive(folder: Path) -> Given:
    return {"model": TINY["llama"].build(), "data": items("llama")}


def kill_revive_loop(folder: Path) -> Given:
    config = LoraConfig(r=4, target_modules="all-linear")
    return {"model": get_peft_model(TINY["llama"].build(), config), "loader": [TINY["llama"].batch()] * 2}


def adapted_data(folder: Path) -> Given:
    return {"model": adapted(), "data": items()}


def texts(folder: Path) -> Given:
    from trl import SFTConfig, SFTTrainer

    from tests.training.trl_cases import tokenizer, words

    return {
        "SFTTrainer": SFTTrainer, "SFTConfig": partial(SFTConfig, **_SMALL, bf16=False), "tokenizer": tokenizer(),
        "model": adapted("llama", r=4), "texts": Dataset.from_list([{"text": words(5, i)} for i in range(8)]),
    }  # fmt: skip


def trl(folder: Path) -> Given:
    from tests.training.trl_cases import PAIRS, PROMPTS, RATED, TEXTS, base_of, tokenizer

    data = {"texts": TEXTS, "pairs": PAIRS, "rated": RATED, "prompts": PROMPTS}
    here = {'Config("out"': 'Config("out", use_cpu=True, bf16=False, max_steps=1, report_to=[]'}
    return {
        **{name: Dataset.from_list(rows) for name, rows in data.items()}, "tokenizer": tokenizer(),
        "model": base_of("sft"), "reward_model": base_of("reward"), REPLACED: here,
    }  # fmt: skip


def bare_loop(folder: Path) -> Given:
    model = adapted(num_full=1, num_forward_only=1)
    return {
        "model": model, "steps": [[TINY["vit"].batch(2, seed=i) for i in range(5)]], "accelerator": Accelerator(),
        "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3),
    }  # fmt: skip


def within_a_micro_batch(folder: Path) -> Given:
    given = bare_loop(folder)
    planner = D2FTPlanner(given["model"])
    planner.plan(given["steps"][0])
    inside = ExitStack().enter_context(planner.micro_batch(0))
    return {**given, "micro_batch": inside, "batch": given["steps"][0][0], "contextlib": contextlib}


def loop_over_samples(folder: Path) -> Given:
    given, dataset = bare_loop(folder), items(count=40)
    model = adapted(policy="importance", compute_budget=0.5)
    return {
        **given, "model": model, "dataset": dataset, "batch": default_data_collator(dataset[:4]),
        "steps": np.arange(40).reshape(2, 20), "collate": default_data_collator,
        "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3),
    }  # fmt: skip


def pissa(folder: Path) -> Given:
    model = adapted(r=4, init_lora_weights="pissa")
    args = TrainingArguments("out", **_SMALL)
    return {"model": model, "trainer": D2FTTrainer(model=model, args=args, train_dataset=items())}


def upper_lora(folder: Path) -> Given:
    return {"model": adapted(r=4, layers_to_transform=[2]), REPLACED: {"/tmp/cache": "cache"}}


def planned(folder: Path) -> Given:
    model, batches = adapted(num_full=1, num_forward_only=1), [TINY["vit"].batch(2, seed=i) for i in range(5)]
    schedule = D2FTPlanner(model).plan(batches)
    return {"model": TINY["vit"].build(), "batch": batches[0], "schedule": schedule}


def cloud(folder: Path) -> Given:
    TINY["llama"].build().save_pretrained(folder / "base")
    server = Cloud(BaseModel.load(str(folder / "base")))
    here = {"localhost:50051": f"localhost:{server.start()}", "meta-llama/Llama-3.2-1B": "base", "active=8": "active=3"}
    return {"data": items("llama"), "server": server, REPLACED: here}


def cloud_with_tls(folder: Path) -> Given:
    ours, token = Authority(folder, "ca"), "a-token-of-an-edge"
    server = Cloud(BaseModel.load(str(folder / "base")), tokens=frozenset({token}))
    port = server.start(certificates=Certificates(None, *ours.sign("server")))
    certificate, key = ours.sign("edge")
    here = {"cloud.example:50051": f"localhost:{port}", '"..."': repr(token), "ca.pem": ours.path,
            "edge.pem": certificate, "edge.key": key}  # fmt: skip
    config = LoraConfig(r=2, target_modules=["q_proj"])
    return {"connect": connect, "Certificates": Certificates, "base": "base", "config": config, "server": server,
            REPLACED: here}  # fmt: skip


def rank(folder: Path) -> Given:
    batches = [TINY["vit"].batch(2, seed=i) for i in range(5)]
    return {"model": TINY["vit"].build(), "data": items(), "steps": [batches], "HeadParallel": HeadParallel,
            "PartialState": PartialState}  # fmt: skip


def saved_llama(folder: Path) -> Given:
    return {"load_head_parallel": load_head_parallel, "AutoModelForCausalLM": AutoModelForCausalLM,
            REPLACED: {"meta-llama/Llama-3.2-1B": "../base"}}  # fmt: skip


def cut(folder: Path) -> Given:
    model = adapted(head_parallel=True)
    return {"model": model, "batches": [TINY["vit"].batch(2, seed=i) for i in range(5)]}


def mamba(folder: Path) -> Given:
    return {"mamba": WHOLE["mamba"].build()}


def quantized(folder: Path) -> Given:
    """A base that is not quantized, since the package may be absent."""
    TINY["llama"].build().save_pretrained(folder / "base")
    return {"name": str(folder / "base"), "AutoModelForCausalLM": AutoModelForCausalLM,
            "BitsAndBytesConfig": lambda **kwargs: None,
            "prepare_model_for_kbit_training": prepare_model_for_kbit_training}  # fmt: skip


GIVEN: dict[str, dict[int, Callable[[Path], Given]]] = {
    "docs/index.md": {0: plain},
    "docs/adapters.md": {0: saved_lora},
    "docs/bases.md": {0: mamba, 1: quantized},
    "docs/dlora.md": {0: cloud, 1: cloud_with_tls},
    "docs/exact_first.md": {0: plain},
    "docs/head_parallel.md": {0: rank, 1: saved_llama, 2: rank},
    "docs/head_start.md": {0: head},
    "docs/how_it_works.md": {0: plain},
    "docs/kill_revive.md": {0: kill_revive, 1: kill_revive_loop},
    "docs/simulator.md": {0: cut, 1: planned},
    "docs/tokens.md": {0: plain},
    "docs/training.md": {
        0: adapted_data, 1: texts, 2: bare_loop, 3: within_a_micro_batch, 4: loop_over_samples, 5: plain, 6: pissa,
        8: adapted_data, 9: upper_lora,
    },
    "docs/trl.md": {number: trl for number in range(6)},
    "docs/unequal_devices.md": {0: plain},
}  # fmt: skip
