"""Bytes between ranks, counted, against sequence-sharded tensor parallelism (torch's own) on the same blocks."""

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from d2ft_peft import D2FTConfig
from d2ft_peft.head_parallel import HeadParallel, Traffic
from tests.distributed.head_parallel import join
from tests.distributed.launch import run
from tests.models import TINY


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

N, SAMPLES, TOKENS = 5, 2, 10
SETTINGS = {
    "3F+2S": {"num_full": 3},
    "2F+1O+2S": {"num_full": 2, "num_forward_only": 1, "forward_score": "weight_magnitude"},
    "3F+2S, spread": {"num_full": 3, "tie_break": "spread"},
    "one rank half as fast": {"device_capacities": [0.8, 0.4], "forward_score": "weight_magnitude"},
    "5F": {"num_full": 5},
}


class BytesOfCollectives(TorchDispatchMode):
    """Bytes that this rank's collectives send to and receive from others, seen below the code that calls them.

    Attributes:
        bytes: Of rows.
        others: Of sums, checks and what is gathered for saving.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, ranks = func.__name__.split(".")[0], dist.get_world_size()
        if name == "all_gather_into_tensor":
            self.bytes += 2 * (ranks - 1) * args[0].nbytes
        elif name == "reduce_scatter_tensor":
            self.bytes += 2 * (ranks - 1) * out.nbytes
        elif name == "alltoall_base_":
            self.bytes += args[0].nbytes + args[1].nbytes
        elif name in ("allreduce_", "send", "recv_"):
            self.others += (2 if name == "allreduce_" else 1) * sum(tensor.nbytes for tensor in args[0])
        elif name == "allgather_":
            self.others += 2 * (ranks - 1) * sum(tensor.nbytes for tensor in args[1])
        return out


def vit():
    return TINY["vit"].build(image_size=24)


def tensor_parallel_bytes() -> int:
    """Forward and backward of a step's samples through the blocks, as torch's tensor parallelism runs them."""
    sequence, mesh = Shard(1), init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "layernorm_before": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(sequence, None), desired_input_layouts=(Replicate(), None)),
        **{f"attention.{name}_proj": ColwiseParallel() for name in "qkv"},
        "attention.o_proj": RowwiseParallel(output_layouts=sequence, use_local_output=False),
        "layernorm_after": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(Replicate(),)),
        "mlp.fc1": ColwiseParallel(),
        "mlp.fc2": RowwiseParallel(output_layouts=sequence, use_local_output=False),
    }
    blocks = vit().vit.layers
    for block in blocks:
        parallelize_module(block, mesh, plan)
    local = torch.randn(N * SAMPLES, TOKENS // dist.get_world_size(), 32, requires_grad=True)
    hidden = DTensor.from_local(local, mesh, [sequence])
    with BytesOfCollectives() as seen:
        for block in blocks:
            hidden = block(hidden, None)
        hidden.to_local().sum().backward()
    return seen.bytes


def head_parallel_bytes(overlap: int = 2, **setting) -> list[int]:
    """(counted by the engine, seen below it) for the rows of one step; the same for everything else, with saving."""
    config = D2FTConfig(head_parallel=True, train_boundary=True, **setting)
    parallel = HeadParallel(get_peft_model(vit(), config).train(), overlap=overlap)
    parallel.traffic.reset()
    batches = [
        {"pixel_values": torch.randn(SAMPLES, 3, 24, 24, generator=torch.Generator().manual_seed(i)),
         "labels": torch.arange(SAMPLES)}
        for i in range(N)
    ]  # fmt: skip
    with BytesOfCollectives() as seen:
        parallel.forward_backward(batches)
        parallel.gather_state_dict()
    traffic = parallel.traffic
    others = sum(traffic.sent.values()) + sum(traffic.received.values()) - traffic.rows
    return [traffic.rows, seen.bytes, others, seen.others]


def count() -> dict:
    join()
    counted = {name: head_parallel_bytes(**setting) for name, setting in SETTINGS.items()}
    overlaps = [head_parallel_bytes(overlap, num_full=3)[0] for overlap in (0, 1)]
    return {"tensor parallel": tensor_parallel_bytes(), "overlaps": overlaps, **counted}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(__name__, "count", tmp_path_factory.mktemp("traffic"), processes=2)


@pytest.mark.parametrize(
    ("setting", "most"),
    {"3F+2S": 0.61, "2F+1O+2S": 0.51, "3F+2S, spread": 0.61, "one rank half as fast": 0.41, "5F": 1.0}.items(),
)
def test_rows_move_fewer_bytes_than_tensor_parallelism(ranks, setting, most):
    ours, theirs = (sum(r) for r in zip(*((r[setting][0], r["tensor parallel"]) for r in ranks), strict=True))
    print(f"{setting}: {ours:,} of {theirs:,} bytes, {ours / theirs:.3f}")
    assert 0 < ours / theirs <= most


def test_the_counter_counts_what_the_collectives_get(ranks):
    for of_rank in ranks:
        for setting in SETTINGS:
            rows, seen_rows, others, seen_others = of_rank[setting]
            assert rows == seen_rows > 0
            assert others == seen_others > 0


def test_overlap_moves_the_same_bytes(ranks):
    for of_rank in ranks:
        assert of_rank["overlaps"] == [of_rank["3F+2S"][0]] * 2


def test_a_reset_counter_counts_from_zero():
    traffic = Traffic()
    traffic.count("dispatch", "heads", 3, 4)
    traffic.count("gradients", "all", 5, 6)
    traffic.steps += 1
    assert (traffic.rows, dict(traffic.axes), traffic.steps) == (7, {"heads": 7, "all": 11}, 1)
    traffic.reset()
    assert (traffic.rows, dict(traffic.axes), traffic.steps) == (0, {}, 0)
    assert not traffic.sent and not traffic.received
