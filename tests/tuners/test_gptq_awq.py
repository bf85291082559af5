"""GPTQ and AWQ: PEFT's LoRA on their layers runs whole samples and whole blocks; heads are never cut.

gptqmodel (7.7, which PEFT needs for both) asks for a newer torch than the package has a CPU build of, so that the gate
does not install it; with ``pip install --no-deps`` it runs.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from d2ft_peft import D2FTConfig
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY


pytestmark = pytest.mark.filterwarnings("ignore")  # gptqmodel's
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def layer_of(kind: str, dense: nn.Linear) -> nn.Module:
    """A quantized layer with integers at random."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed: GPTQ and AWQ are not tried")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer = (TorchLinear if kind == "gptq" else AwqTorchLinear)(
        bits=4, group_size=32, sym=kind == "gptq", desc_act=False, in_features=dense.in_features,
        out_features=dense.out_features, bias=False, register_buffers=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(dense.weight.numel())
    for integers in (layer.qweight, layer.qzeros):
        values = torch.randint(-(2**31), 2**31, integers.shape, generator=generator)
        integers.copy_(values.to(torch.int32))
    layer.scales = torch.full_like(layer.scales, 0.01, dtype=torch.bfloat16)
    layer.post_init()
    return layer


def quantized(kind: str) -> nn.Module:
    model = TINY["llama"].build(hidden_size=64, intermediate_size=128).bfloat16()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, layer_of(kind, child))
    return model


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_whole_samples_are_peft_to_the_bit_and_heads_are_not_cut(kind):
    torch.manual_seed(3)
    ours = get_peft_model(quantized(kind), D2FTConfig(r=4, lora_alpha=8)).train()
    torch.manual_seed(3)
    plain = get_peft_model(quantized(kind), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).train()
    runtime = get_runtime(ours)
    with runtime.use(compile_plan(runtime.partitions["default"], [2] * 6)):
        ours(**TINY["llama"].batch()).loss.backward()
    plain(**TINY["llama"].batch()).loss.backward()
    grads, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (ours, plain))
    assert grads.keys() == expected.keys() and all(grads[name].equal(expected[name]) for name in grads)
    assert any(grad.any() for grad in grads.values())
    with pytest.raises(ValueError, match="q_proj is a .*TorchLinear, which cannot be cut into heads"):
        get_peft_model(quantized(kind), D2FTConfig(r=4, policy="bilevel", subnets="heads"))
    blocks = get_peft_model(quantized(kind), D2FTConfig(r=4, policy="bilevel", subnets="blocks"))
    assert get_runtime(blocks).partitions["default"].num_scheduled == 3
