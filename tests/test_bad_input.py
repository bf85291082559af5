"""Bad input as a table: what is given, and the ValueError that names field, value, constraint and what to do.

`tests/test_config.py` has more rows for `D2FTConfig`, `tests/test_fuzzed_input.py` draws them at random.
"""

import functools
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from d2ft_peft import (
    AveragedWeightsCallback,
    BranchSpec,
    D2FTCallback,
    D2FTConfig,
    D2FTPlanner,
    D2FTTrainer,
    KillReviveCallback,
    Schedule,
    fit_head,
    partition_model,
    register_architecture,
    register_policy,
)
from d2ft_peft.dlora import BaseModel, Cloud, KillReviveRule, Limits
from d2ft_peft.dlora.cloud.__main__ import main as serve
from d2ft_peft.dlora.cloud.turns import Turns
from d2ft_peft.head_parallel import balanced_capacities, place_subnets
from d2ft_peft.report import format_table, plot_loss_curves, plot_schedule
from d2ft_peft.schedule import Budget, Problem, get_policy
from d2ft_peft.simulate import Cluster, Device, Link, Workload, data_parallel, fit_line, head_parallel, tensor_parallel
from tests.models import TINY


NAN, INF = math.nan, math.inf
ONES = np.ones((3, 4))
TWO = Cluster((Device(1e12), Device(1e12)), Link(1e-5, 1e9))


@functools.cache
def vit(**config):
    return get_peft_model(TINY["vit"].build(), D2FTConfig(**config))


@functools.cache
def partition():
    return partition_model(TINY["vit"].build())


@functools.cache
def workload():
    return Workload(partition(), tokens=5)


@functools.cache
def composing():
    planner = D2FTPlanner(vit(policy="fewer_samples"))
    planner.prepare(TINY["vit"].batch(2))
    return planner


@functools.cache
def planned():
    planner = D2FTPlanner(vit(num_full=1))
    planner.plan([TINY["vit"].batch(2)] * 3)
    return planner


def problem(**fields):
    return Problem(**{"forward_scores": ONES, "backward_scores": ONES, "budget": Budget(compute=0.5), **fields})


def train(model, data, **kwargs):
    args = TrainingArguments("unused", use_cpu=True, report_to=[], max_steps=1, save_strategy="no", **kwargs)
    D2FTTrainer(model=model, args=args, train_dataset=data).train()


CONFIG = [
    (
        {"compute_budget": ()},
        r"compute_budget=\(\) must be a number in \(0, 1\]; device_capacities is what",
    ),
    ({"compute_budget": [0.5]}, r"compute_budget=\[0.5\] must be a number in \(0, 1\]"),
    ({"compute_budget": NAN}, r"compute_budget=nan must be a number in \(0, 1\]; give the share"),
    ({"compute_budget": -0.5}, r"compute_budget=-0.5 must be in \(0, 1\], or nothing trains; the nearest possible is"),
    ({"communication_budget": INF}, r"communication_budget=inf must be a number in \(0, 1\]"),
    ({"num_full": 0.5}, "num_full=0.5 must be a whole number of micro-batches"),
    ({"num_full": -1}, "num_full=-1 must not be negative; the nearest possible is 1"),
    ({"device_capacities": [], "head_parallel": True}, r"device_capacities=\[\] must be a list of numbers, or 'auto'"),
    ({"policy": ""}, "policy='' is unknown; choose one of"),
    ({"rows": ""}, "rows='' must be one of micro_batches, samples, tokens"),
    ({"rows": False}, "rows=False must be one of"),
    ({"backward_score": ""}, "backward_score='' must be one of weight_magnitude, fisher"),
    ({"forward_score": 0}, "forward_score=0 must be one of"),
    ({"forward_score": ["fisher"]}, r"forward_score=\['fisher'\] must be one of"),
    ({"padding": {}}, "padding={} must be one of compose, flatten, keep"),
    ({"token_ramp": False}, "token_ramp=False is for policy='fewer_tokens'"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
    ({"policy": "fewer_samples", "head_parallel": True}, "rows='samples' skips whole .* head_parallel=True; choose"),
    ({"r": 10**9}, "r=1000000000 must be at most 65536; projections are no wider"),
    ({"r": 4, "lora_alpha": 0}, "lora_alpha=0 must be a positive number"),
    ({"r": 4, "lora_alpha": "16"}, "lora_alpha='16' must be a positive number"),
    ({"r": 4, "lora_dropout": -0.1}, r"lora_dropout=-0.1 must be a number in \[0, 1\)"),
    ({"r": 4, "lora_dropout": 1}, r"lora_dropout=1 must be a number in \[0, 1\)"),
    ({"r": 4, "lora_dropout": NAN}, r"lora_dropout=nan must be a number in \[0, 1\)"),
    ({"r": 4, "bias": True}, "bias=True must be one of none, all, lora_only"),
    ({"r": 4, "bias": "some"}, "bias='some' must be one of none, all, lora_only"),
    ({"r": 4, "use_rslora": "yes"}, "use_rslora='yes' must be True or False"),
    ({"r": 4, "fan_in_fan_out": 1}, "fan_in_fan_out=1 must be True or False"),
    ({"r": 4, "init_lora_weights": 3}, "init_lora_weights=3 must be True, False, or the name of one of PEFT's"),
    ({"r": 4, "rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\] must be a dictionary from patterns"),
    ({"r": 4, "rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 must be an integer of at least 1"),
    ({"r": 4, "alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\]=-1 must be a positive number"),
    ({"layers_to_transform": -1}, "layers_to_transform=-1 must be the number of a block, from 0 on, or a list"),
    ({"layers_to_transform": "0"}, "layers_to_transform='0' must be the number of a block"),
    ({"layers_to_transform": [True]}, r"layers_to_transform=\[True\] must be the number of a block"),
    ({"layers_pattern": 3}, "layers_pattern=3 must be the name of a list of blocks"),
    ({"exclude_modules": 3}, "exclude_modules=3 must be a list of names of modules"),
]
NUMBERS = [
    (lambda: Budget(compute=[]), r"device_capacities=\[\] must have a share for each device; give exactly one of"),
    (lambda: Budget(compute="half"), "compute_budget='half' must be a number"),
    (lambda: Schedule([[2, 1], [0]]), "operations must have rows of one length"),
    (lambda: Schedule([[2, 3]]), r"operations\[0, 1\]=3 must be in 0..2; use the values of Operation"),
    (lambda: Schedule([[2, 1]], devices=[[0], [0, 1]]), "devices must have rows of one length"),
    (lambda: Schedule([[2, 1]], weights=[NAN]), r"weights\[0\]=nan must be finite; give the size of each micro-batch"),
    (lambda: Schedule.all_full(0, 3), "num_micro_batches=0 must be an integer of at least 1"),
    (lambda: Schedule.all_full(2, 2.5), "num_subnets=2.5 must be an integer of at least 1"),
    (lambda: Schedule.from_dict(None), "data=None must be a dictionary, as Schedule.to_dict returns it"),
    (lambda: problem(forward_scores=[[1], [1, 2]]), "forward_scores must have rows of one length"),
    (lambda: problem(tie_break=["spread"]), r"tie_break=\['spread'\] must be one of"),
    (lambda: problem(interval=True), "interval=True must be an integer of at least 1"),
    (lambda: problem(budget=0.5), "budget=0.5 must be a Budget"),
    (lambda: problem().schedule([[2], [2, 2]]), "operations must have rows of one length"),
    (lambda: get_policy(["bilevel"]), r"policy=\['bilevel'\] is unknown; choose one of"),
    (lambda: register_policy(""), "name='' must be a name, a string that is not empty"),
    (lambda: register_policy("mine", reads=3), "reads=3 must name 'backward', 'forward' or both"),
    (lambda: register_policy("mine", backward_score=None), "backward_score=None must be a name"),
    (lambda: Device(flops=0), "Device.flops=0 must be positive"),
    (lambda: Device(flops="fast"), "Device.flops='fast' must be a number"),
    (lambda: Link(latency=INF, bandwidth=1), "Link.latency=inf must be not negative, and finite"),
    (lambda: Cluster((1, 2)), r"devices=\(1, 2\) must be a sequence of Device"),
    (lambda: Cluster(TWO.devices, link=None), "link=None must be a Link"),
    (lambda: Cluster(TWO.devices, replicas=0.5), "replicas=0.5 must be a whole number"),
    (lambda: fit_line([1, "two"], [1, 2]), r"amounts=\[1, 'two'\] must be a sequence of numbers"),
    (lambda: fit_line([1, 1], [1, 2]), r"amounts=\[1, 1\] and seconds=\[1, 2\]: a line needs .* two sizes"),
    (lambda: balanced_capacities(None, [1], 0.6), "seconds=None must be a sequence of numbers"),
    (lambda: balanced_capacities([1], [1], "0.6"), r"compute_budget=0.6 must be in \(0, 1\]; give the share"),
    (lambda: Limits(sessions=0.5), "sessions=0.5 must be above zero, a finite whole number; leave it out"),
    (lambda: Limits(idle_seconds=INF), "idle_seconds=inf must be above zero, a finite number; leave it out"),
    (lambda: Turns(0), "compute_at_once=0 must be an integer of at least 1"),
    (lambda: KillReviveRule(active=0), "active=0 must be a whole number, at least 1; at least one module must train"),
    (lambda: KillReviveCallback(active="all"), "active='all' must be a whole number, at least 1"),
    (lambda: AveragedWeightsCallback(share="all"), r"share='all' must be a number in \(0, 1\], or None"),
    (lambda: AveragedWeightsCallback(decay=True), r"decay=True must be a number in \(0, 1\), or None"),
    (lambda: format_table("rows"), "rows='rows' must be a list of dictionaries from column names"),
    (lambda: format_table([{"a": 1}], columns="a"), "columns='a' must be a list of names"),
    (lambda: format_table([{"a": 1}], formats=[".2f"]), r"formats=\['.2f'\] must be a dictionary from column names"),
    (lambda: plot_loss_curves([1], "x.png"), r"curves=\[1\] must not be empty: a dictionary of points"),
    (lambda: plot_schedule("x", "x.png"), "schedule is a str, it must be a Schedule; build it with"),
]
MODELS = [
    (lambda: D2FTPlanner(None), r"NoneType is not a D2FT model; wrap it with get_peft_model"),
    (lambda: D2FTPlanner(TINY["vit"].build()), "ViTForImageClassification is not a D2FT model; wrap it with"),
    (lambda: D2FTPlanner(vit(), num_micro_batches=0), "num_micro_batches=0 must be an integer of at least 1, or None"),
    (lambda: D2FTPlanner(vit(), steps=-1), "steps=-1 must be an integer of at least 1, or None"),
    (lambda: planned().plan(3), "batches=int: give a list of the micro-batches"),
    (lambda: planned().plan([]), "batches=list of 0: give a list of the micro-batches"),
    (lambda: planned().peek("0"), "index='0' is none of the 3 micro-batches that are planned"),
    (lambda: planned().peek(3), "index=3 is none of the 3 micro-batches that are planned"),
    (lambda: composing().compose(["a"], 2), r"indices=\['a'\] must be a sequence of whole numbers"),
    (lambda: composing().compose([], 2), "indices is empty; give the candidates of one optimizer step"),
    (lambda: composing().compose([1, 2], 0), "size=0 must be an integer of at least 1"),
    (lambda: composing().compose([1, 2], 2, lengths=[3]), r"lengths=\[3\] must be the tokens of each of the 2 samples"),
    (lambda: partition_model(None), "model=None must be a model, a torch.nn.Module"),
    (
        lambda: partition_model(TINY["vit"].build(), 3),
        r"heads_per_subnet=3 does not divide the 4 heads .*choose one",
    ),
    (lambda: partition_model(TINY["vit"].build(), True), "heads_per_subnet=True does not divide the 4 heads"),
    (lambda: register_architecture("mine", None), "architecture=None must be an Architecture"),
    (lambda: register_architecture("", None), "model_type='' must be a name"),
    (lambda: BranchSpec("attn", "qkv", "out"), r"columns='qkv' must be a tuple of names; a single one takes a comma"),
    (lambda: place_subnets(partition(), 0), "num_ranks=0 must be an integer of at least 1"),
    (lambda: place_subnets(partition(), 5), "5 processes cannot share the 4 subnets of a block"),
    (lambda: Workload(None, tokens=5), "partition=None must be what partition_model returns"),
    (lambda: Workload(partition(), tokens=0), "tokens=0 must be an integer of at least 1"),
    (lambda: Workload(partition(), tokens=5, state_bytes=NAN), "state_bytes=nan must be a finite number, not negative"),
    (lambda: data_parallel(workload(), TWO, 0), "samples=0 must be a finite number above zero"),
    (lambda: data_parallel(None, TWO, 8), "workload=None must be a Workload; workload_of_model makes one"),
    (lambda: tensor_parallel(workload(), None, 8), "cluster=None must be a Cluster of devices"),
    (lambda: head_parallel(workload(), TWO, None), "schedule=None must be a Schedule"),
    (lambda: fit_head(None, []), "model=None must be a model"),
    (lambda: fit_head(vit(), 3), "batches=3 must be a data loader, or a list of batches"),
    (lambda: fit_head(vit(), []), "batches is empty: give at least one batch with labels"),
    (lambda: fit_head(vit(), [], l2=NAN), "l2=nan must be a finite number, not negative"),
    (lambda: get_peft_model(TINY["vit"].build(), D2FTConfig(layers_to_transform=[7])), "layers_to_transform"),
    (lambda: get_peft_model(TINY["vit"].build(), D2FTConfig(heads_per_subnet=3)), "heads_per_subnet=3 does not divide"),
    (
        lambda: get_peft_model(TINY["vit"].build(), D2FTConfig(r=2, init_lora_weights="no")),
        "init_lora_weights='no'",
    ),
    (lambda: train(TINY["vit"].build(), [{}]), "is not a D2FT model; wrap it with get_peft_model"),
    (lambda: train(vit(), [{"a": 1}]), r"a batch with keys \[\] is not what the model takes"),
]


@pytest.mark.parametrize(
    "fields, message", CONFIG, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_a_configuration_names_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        D2FTConfig(**fields)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("call, message", NUMBERS + MODELS, ids=[message[:40] for _, message in NUMBERS + MODELS])
def test_a_call_names_what_cannot_be(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call()


def test_a_callback_that_comes_too_late_says_so(tmp_path):
    batch = TINY["vit"].batch(2)
    data = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    trainer = Trainer(
        get_peft_model(TINY["vit"].build(), D2FTConfig()),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), train_dataset=data,
    )  # fmt: skip
    trainer.add_callback(D2FTCallback())
    with pytest.raises(ValueError, match="D2FTCallback was added to a Trainer that already exists; give it to the"):
        trainer.train()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    TINY["llama"].build().save_pretrained(folder)
    return str(folder)


SERVING = [
    (["--dtype", "floaty"], "dtype='floaty' must be 'auto' or a floating-point type of torch, such as"),
    (["--dtype", "int8"], "dtype='int8' must be 'auto' or a floating-point type"),
    (["--device", "gpu9"], "device='gpu9' must be a device of torch, such as 'cpu'"),
    (["--port", "99999"], "port=99999 must be from 0 to 65535; 0 takes a free one"),
    (["--port", "-1"], "port=-1 must be from 0 to 65535"),
    (["--compute-at-once", "0"], "compute_at_once=0 must be an integer of at least 1"),
    (["--memory-gib", "nan"], "memory_gib=nan must be a finite number above zero; leave it out for no limit"),
    (["--memory-gib", "-1"], "memory_gib=-1.0 must be a finite number above zero"),
    (["--certificate", "a.pem"], "certificate='a.pem' and key=None belong together; give both"),
    (["--sessions", "-2"], "sessions=-2 must be above zero"),
]


@pytest.mark.parametrize(
    "arguments, message", SERVING, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_the_command_that_serves_names_what_cannot_be(base, arguments, message):
    with pytest.raises(ValueError, match=message):
        serve([base, *arguments])


def test_in_a_shell_that_is_one_line(monkeypatch):
    from d2ft_peft.dlora.cloud.__main__ import command

    monkeypatch.setattr("sys.argv", ["d2ft-cloud", "no/such/folder/here", "--dtype", "floaty"])
    with pytest.raises(SystemExit, match="^d2ft-cloud: error: dtype='floaty' must be"):
        command()


def test_a_cloud_is_asked_for_a_port_that_there_is(base):
    cloud = Cloud(BaseModel.load(base, torch.float32))
    with pytest.raises(ValueError, match="port='50051' must be from 0 to 65535"):
        cloud.start("50051")


def test_the_table_is_long_enough():
    assert len(CONFIG) + len(NUMBERS) + len(MODELS) + len(SERVING) >= 100
