"""Noise on hidden states that leave the edge is a part of the model: its size follows the states, in gradients too."""

import pytest
import torch

from .cases import adapter, check_close, edge_like, ragged, serve, step, tiny_base, whole


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{}, {"edge_blocks": (1, 0)}, {"edge_blocks": (2, 0), "head": "cloud"}], ids=str)
def test_gradients_are_those_of_a_local_model_with_the_same_noise(tmp_path, options):
    base = tiny_base(tmp_path)
    local = whole(base, adapter())
    below = options.get("edge_blocks", (0, 0))[0]

    def disturb(block, args):
        size = args[0].float().square().mean(-1, keepdim=True).sqrt()
        return args[0] + (0.5 * size * torch.randn_like(args[0], dtype=torch.float32)).double(), *args[1:]

    local.get_base_model().model.layers[below].register_forward_pre_hook(disturb)
    with serve(base) as (_, address):
        edge = edge_like(local, address, base, adapter(), noise=0.5, **options)
        torch.manual_seed(3)
        loss, grads = step(local, ragged())
        torch.manual_seed(3)
        found, edge_grads = step(edge, ragged())
        torch.testing.assert_close(found, loss)
        check_close(edge_grads, grads, 1e-6)  # noise is drawn and scaled in float32
