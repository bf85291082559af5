"""Which tokens are drawn: real ones first, the ones that are read always, and by what the choice is named after."""

import pytest
import torch

from d2ft_peft.engine.patch_variance import patch_variance
from d2ft_peft.engine.token_choice import TokenChoice


def choice(kind, keep=6, seed=0, **kwargs):
    return TokenChoice(kind, range(1, 3), lambda tokens: keep, (seed,), **kwargs)


def drawn(kind, hidden, real=None, is_causal=False, **kwargs):
    """Positions of the kept tokens of many passes, [passes, B, K]."""
    return torch.stack(
        [choice(kind, seed=seed, **kwargs).new_pass().selection(1, hidden, lambda: real, is_causal).index
         for seed in range(200)]
    )  # fmt: skip


def shares(positions, tokens):
    """How often each token is kept, [B, T]."""
    return torch.nn.functional.one_hot(positions, tokens).sum(2).float().mean(0)


HIDDEN = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
RIGHT = torch.arange(16) < torch.tensor([[16], [9], [4]])


@pytest.mark.parametrize("real", [RIGHT, RIGHT.flip(1)], ids=["right", "left"])
@pytest.mark.parametrize("kind", ["random", "random_per_block", "grid", "attention"])
def test_padding_is_kept_only_where_a_sample_has_too_few_real_tokens(kind, real):
    kept = drawn(kind, HIDDEN, real, is_causal=kind != "attention")
    assert (kept.diff(dim=2) > 0).all()  # in order, none twice
    of_real = real.expand(len(kept), -1, -1).gather(2, kept).sum(2)
    assert (of_real == torch.tensor([6, 6, 4])).all()
    first = real.int().argmax(1)
    last = 15 - real.flip(1).int().argmax(1)
    assert (kept == first[:, None]).any(2).all()
    assert kind == "attention" or (kept == last[:, None]).any(2).all()


def test_every_token_is_as_likely_as_any_other():
    for kind in ("random", "random_per_block", "grid"):
        share = shares(drawn(kind, HIDDEN), 16)
        assert (share[:, 0] == 1).all() and (share[:, 1:] - 5 / 15).abs().max() < 0.15


def test_a_grid_leaves_gaps_of_equal_size():
    hidden = torch.zeros(2, 61, 4)
    gaps = drawn("grid", hidden, keep=21)[:, :, 1:].diff(dim=2)
    assert gaps.max() == gaps.min() == 3


def test_a_patch_with_more_to_see_is_kept_more_often():
    variance = torch.linspace(0, 1, 15).repeat(3, 1)
    share = shares(drawn("variance", HIDDEN, variance=variance), 16)
    assert (share[:, 0] == 1).all() and share[0, 1:8].sum() < 0.6 * share[0, 9:].sum()
    assert (share > 0).all()


def test_what_the_mean_token_attends_to_is_kept_more_often():
    hidden = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
    hidden[:, 8:] = hidden[:, 8:9] + 0.1 * hidden[:, 8:]
    share = shares(drawn("attention", hidden), 16)
    assert share[0, 1:8].mean() < 0.8 * share[0, 8:].mean()


def test_tokens_are_drawn_once_a_pass_or_by_every_block():
    for kind, same in (("random_per_block", False), ("random", True), ("grid", True)):
        first, second = (draws := choice(kind)).new_pass(), draws.new_pass()
        one, two = (first.selection(block, HIDDEN, lambda: None, False).index for block in (1, 2))
        assert one.equal(two) == same
        assert not second.selection(1, HIDDEN, lambda: None, False).index.equal(one)
        again = choice(kind).new_pass()
        assert again.selection(1, HIDDEN, lambda: None, False).index.equal(one)  # by the seed alone


def test_the_variance_of_a_patch_is_that_of_its_pixels():
    pixels = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    by_hand = [
        [torch.stack([part.var(unbiased=False) for part in pixels[b, :, y : y + 4, x : x + 4]]).mean()
         for y in range(0, 8, 4) for x in range(0, 12, 4)]
        for b in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(patch_variance(pixels, (4, 4)), torch.tensor(by_hand))
