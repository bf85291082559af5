"""The other ways to train one model on several processes that `parallel.py` puts beside the head-parallel engine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed.configuration_utils import DistributedConfig

from d2ft_peft import partition_model


Batch = dict[str, Tensor]
Peer = tuple[nn.Module, Callable[[Batch], Tensor]]
"""A model as one process holds it, and a function that runs forward and backward of all samples of a step, after which
gradients are ready for the optimizer, and returns the loss of the samples that this process saw."""


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> Peer:
    """Megatron's, by torch's own tools: heads and FFN are cut, rows between the branches are shared out by token."""
    model, sequence = copy.deepcopy(model), Shard(1)
    partition = partition_model(model)
    inside = [name for name in partition.boundary if name.startswith(tuple(f"{block}." for block in partition.blocks))]
    plan = dict.fromkeys(inside, SequenceParallel())
    for branch in partition.branches:
        plan.update({projection.name: ColwiseParallel() for projection in branch.columns})
        plan[branch.row.name] = RowwiseParallel(output_layouts=sequence, use_local_output=False)
        model.get_submodule(branch.region).register_forward_pre_hook(_gather_rows, with_kwargs=True)
    parallelize_module(model, mesh, plan)
    first, last = (model.get_submodule(partition.blocks[i]) for i in (0, -1))
    first.register_forward_pre_hook(lambda module, args: (_enter(args[0], mesh), *args[1:]))
    last.register_forward_hook(lambda module, args, out: _Leave.apply(out.to_local()))

    def step(batch: Batch) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        # Norms saw the rows of this rank only.
        for parameter in model.parameters():
            if isinstance(parameter.grad, DTensor) and any(p.is_partial() for p in parameter.grad.placements):
                parameter.grad = parameter.grad.redistribute(placements=[Replicate()])
        return loss.detach()

    return model, step


def _gather_rows(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0].redistribute(placements=[Replicate()]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].redistribute(placements=[Replicate()])}


def _enter(hidden: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(_Enter.apply(hidden), mesh, [Shard(1)])


class _Enter(torch.autograd.Function):
    """Keep this rank's tokens of rows that every rank has made; every rank needs the gradient of all of them."""

    @staticmethod
    def forward(ctx, x):
        return x.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()

    @staticmethod
    def backward(ctx, grad):
        return _all_tokens(grad)


class _Leave(torch.autograd.Function):
    """Give every rank the rows of all tokens. All compute the same loss, so the gradient needs no sum."""

    @staticmethod
    def forward(ctx, x):
        return _all_tokens(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()


def _all_tokens(x: Tensor) -> Tensor:
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x.contiguous())
    return torch.cat(everyone, 1)


def transformers_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> Peer:
    """What ``tp_plan="auto"`` does: the model's own plan, rows replicated on all ranks. For models that have a plan."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        model.save_pretrained(folder[0])  # the first rank writes
        dist.barrier()
        config = DistributedConfig(tp_size=mesh.size(), tp_plan="auto")
        model = type(model).from_pretrained(folder[0], distributed_config=config, dtype=torch.float32)
        dist.barrier()
    return model.train(), _plain_step(model)


def data_parallel(model: nn.Module, mesh: DeviceMesh) -> Peer:
    """DDP: every rank has the whole model and its own samples."""
    model = DistributedDataParallel(copy.deepcopy(model))
    return model, _plain_step(model)


def fully_sharded(model: nn.Module, mesh: DeviceMesh) -> Peer:
    """FSDP2: data parallel with parameters shared out, gathered block by block when they are needed."""
    model = copy.deepcopy(model)
    for name in partition_model(model).blocks:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, _plain_step(model)


def _plain_step(model: nn.Module) -> Callable[[Batch], Tensor]:
    def step(batch: Batch) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step
