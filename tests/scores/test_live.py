"""Scores that follow training: one for each sample, finite wherever it counts, and no waiting for a device."""

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from d2ft_peft import partition_model
from d2ft_peft.schedule import Budget, Problem, get_policy
from d2ft_peft.scores import LiveScores, ScoreSource, live_score, score_outputs, shifts_labels
from tests.models import TINY


INF, NAN = np.inf, np.nan


def source(name="llama", score="loss"):
    model = TINY[name].build().eval()
    return ScoreSource(model, partition_model(model), (score,), interval=1)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([2.0, INF, 4.0], [2, 4, 4]),  # as hard as the hardest
        ([2.0, NAN, 4.0], [2, 3, 4]),  # nothing is known of it
        ([INF, NAN, INF], [1, 1, 1]),
        ([1e300, 2.0, 3.0], [3, 2, 3]),  # infinite in float32
        ([-INF, 2.0, 4.0], [3, 2, 4]),
        ([3e38, 3e38, NAN], [3e38, 3e38, 3e38]),
    ],
)
def test_scores_that_are_not_finite_are_remembered_as_something_that_is(seen, expected):
    scores = LiveScores("loss")
    scores.update(np.arange(3), np.array(seen))
    np.testing.assert_allclose(scores.lookup(np.arange(3)), expected, rtol=1e-6)


def test_the_hardest_sample_need_not_be_among_those_looked_up():
    scores = LiveScores("loss")
    scores.update(np.arange(3), np.array([9.0, INF, 1.0]))
    assert scores.lookup(np.array([1, 2])).tolist() == [9, 1]


@pytest.mark.parametrize("policy", ["importance", "selective_backprop"])
@pytest.mark.parametrize("score", ["loss", "el2n"])
def test_a_sample_that_diverged_does_not_end_the_run(policy, score):
    watched = source("vit", score)
    logits = torch.randn(4, 5)
    logits[1, 2], logits[2, 0] = -INF, NAN
    watched.observe(np.arange(4), logits, torch.tensor([0, 2, 1, 3]))
    scores = watched.of(score, np.arange(4), step=1)
    assert np.isfinite(scores).all()
    problem = Problem(np.ones(scores.shape), scores, Budget(compute=0.5), rng=np.random.default_rng(0))
    assert (~get_policy(policy)(problem).skipped).sum() == 2


class NoReads(TorchDispatchMode):
    """Fails where Python asks a tensor for a number: on a GPU it would wait there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor was read"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("score", ["loss", "el2n"])
def test_observing_reads_no_tensor(score):
    watched = source(score=score)
    ids = torch.arange(10)[None] % 5
    logits = torch.randn(1, 10, 7)
    with NoReads():
        watched.observe([0, 1], torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.long))
        watched.observe([2, 3], logits, ids, position_ids=ids)
        watched.observe([4, 5], logits, ids, cu_seq_lens=torch.tensor([0, 5, 10]))
        watched.observe([6, 7], torch.randn(2, 1), torch.ones(2))
    assert np.isfinite(watched.live[score].values[:8]).all()
    with pytest.raises(AssertionError, match="a tensor was read"), NoReads():
        bool(torch.ones(1))


def test_scores_are_taken_over_when_they_are_asked_for():
    watched = source()
    logits, labels = torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.long)
    expected = live_score("loss", watched.model, logits, labels)
    watched.observe(np.array([3, 1]), logits, labels)
    loaded = LiveScores("loss")
    loaded.restore(watched.live["loss"].values)
    assert loaded.lookup(np.array([3, 1])).tolist() == expected.tolist()
    assert watched.of("loss", np.array([3]), 1)[0, 0] == expected[0]


def test_later_visits_win_however_they_came():
    watched = source("vit")
    logits, labels = torch.eye(2), torch.tensor([0, 1])
    watched.observe(np.array([0, 1]), logits, labels)
    watched.update(np.array([0]), {"loss": np.array([7.0])})
    assert watched.live["loss"].lookup(np.array([0]))[0] == 7
    watched.observe(np.array([0, 1]), logits, labels)
    assert watched.live["loss"].lookup(np.array([0]))[0] < 1


def test_what_is_under_way_does_not_pile_up():
    watched = source("vit")
    for _ in range(600):
        watched.observe(np.array([0, 1]), torch.eye(2), torch.tensor([0, 1]))
    assert len(watched.live["loss"]._pending) <= 256


def joined():
    """Three sequences in one row as DataCollatorWithFlattening has them, and the same with padding."""
    sequences = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    flat = tf.DataCollatorWithFlattening()([{"input_ids": s, "labels": s} for s in sequences])
    rows = torch.full((3, 4), -100)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    logits = torch.randn(1, 9, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.zeros(3, 4, 20, dtype=torch.float64)
    for row, part in enumerate(logits[0].split([3, 2, 4])):
        padded[row, : len(part)] = part
    return flat, logits, rows, padded


@pytest.mark.parametrize("score", ["loss", "el2n"])
def test_sequences_without_padding_score_as_with_it(score):
    model = TINY["llama"].build()
    flat, logits, rows, padded = joined()
    expected = live_score(score, model, padded, rows)
    own = {"position_ids": flat["position_ids"]}
    bounds = {"cu_seq_lens": torch.tensor([0, 3, 5, 9])}
    shifted = torch.nn.functional.pad(flat["labels"], (0, 1), value=-100)[:, 1:]
    for labels, told in (
        (flat["labels"], own),
        (flat["labels"], bounds),
        (flat["input_ids"], own),  # first tokens are no targets even where their labels say so
        (None, own | {"shift_labels": shifted}),
    ):
        np.testing.assert_allclose(score_outputs(score, model, logits, labels, 3, **told), expected, rtol=1e-5)


def test_labels_that_are_shifted_already_are_not_shifted_again():
    model = TINY["llama"].build()
    batch = TINY["llama"].batch()
    logits = model(**batch).logits
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    np.testing.assert_allclose(
        score_outputs("loss", model, logits, None, 3, shift_labels=shifted),
        live_score("loss", model, logits, batch["labels"]),
        rtol=1e-6,
    )


def test_each_sample_needs_a_value():
    flat, logits, rows, padded = joined()
    watched = source()
    message = r"score 'loss': {} values of {} samples .*give its position_ids.*policy='fewer_samples'"
    with pytest.raises(ValueError, match=message.format(1, 3)):
        watched.observe(np.arange(3), logits, flat["labels"])
    with pytest.raises(ValueError, match=message.format(3, 5)):  # packed rows
        watched.observe(np.arange(5), padded, rows)
    with pytest.raises(ValueError, match=message.format(2, 3)):
        watched.observe(np.arange(3), logits, flat["labels"], cu_seq_lens=torch.tensor([0, 4, 9]))
    watched.observe(np.arange(4), logits, flat["labels"], position_ids=flat["position_ids"])
    with pytest.raises(ValueError, match=message.format(3, 4)):  # known once the numbers are here
        watched.of("loss", np.arange(4), 1)


class RemoteForCausalLM(tf.LlamaForCausalLM):
    """Like a class that comes with a checkpoint: no mapping of transformers knows its name."""


def test_models_shift_labels_by_what_their_loss_does():
    llama = RemoteForCausalLM(tf.LlamaConfig(**TINY["llama"].kwargs))
    assert shifts_labels(llama)
    assert shifts_labels(get_peft_model(llama, LoraConfig(target_modules=["q_proj"])))
    assert not shifts_labels(TINY["bert"].build())
    assert not shifts_labels(torch.nn.Identity())
    t5 = tf.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert not shifts_labels(tf.T5ForConditionalGeneration(t5))
