"""Counted FLOPs: PyTorch's counter, which leaves out fused attention on the CPU and experts, with those put in."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _forward(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _grouped(a, b, *args, out_shape=None, **kwargs) -> int:
    """Product of the rows of each group with a matrix of its own: [M, K] x [E, K, N], or its gradient per group."""
    if len(a) == 2:  # each row meets one group only, as a summand where there is a result for every group
        return 2 * a[0] * a[1] * b[-1]
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(b) == 3 else 1)


def _grouped_backward(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * _grouped(x, weight)


def flop_counter() -> FlopCounterMode:
    """A context manager that counts the FLOPs of what runs within it; read ``get_total_flops()`` afterwards."""
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        aten._grouped_mm: _grouped,
    }
    of_experts = torch.ops.transformers  # filled by transformers.integrations.moe, once a model needs it
    for name, count in (("grouped_mm_fallback", _grouped), ("grouped_mm_fallback_backward", _grouped_backward)):
        if hasattr(of_experts, name):
            mapping[getattr(of_experts, name)] = count
    return FlopCounterMode(display=False, custom_mapping=mapping)
