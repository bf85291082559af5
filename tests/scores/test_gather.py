"""Scores of several processes: the same on all of them, whatever each has seen."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from d2ft_peft import partition_model
from d2ft_peft.scores import ScoreSource, ScoreTable, gather, gather_tables
from tests.distributed.launch import run
from tests.models import TINY


pytestmark = pytest.mark.distributed


def part(samples, width=3):
    """Sample i has the scores i, i + 0.5, ..."""
    samples = np.array(samples, dtype=np.int64)
    values = samples[:, None] + 0.5 * np.arange(width)
    return ScoreTable("fisher", samples, values.astype(np.float32))


def gather_parts():
    dist.init_process_group("gloo")
    gather._CHUNK_BYTES = 30  # two rows at a time
    results = []
    for parts in (([4, 0, 7], [1, 4, 9, 8, 2]), ([], [3, 1]), ([5], [])):
        table = gather_tables(part(parts[dist.get_rank()]))
        results.append((table.samples.tolist(), table.values.tolist()))
    try:
        gather_tables(part([]))
    except ValueError as error:
        results.append(str(error))
    dist.destroy_process_group()
    return results


@pytest.mark.thorough
def test_every_process_gets_the_whole_table(tmp_path):
    first, second = run(__name__, "gather_parts", tmp_path)
    assert first == second
    for (samples, values), expected in zip(first, ([0, 1, 2, 4, 7, 8, 9], [1, 3], [5]), strict=False):
        assert samples == expected
        assert values == part(expected).values.tolist()
    assert "no sample has a finite score" in first[-1]


def share_visits():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = TINY["vit"].build()
    source = ScoreSource(model, partition_model(model), ("loss",), 1)
    labels = torch.tensor([0, 2, 1])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(rank))
    if rank == 0:
        logits[0], logits[1, 2] = torch.nan, -torch.inf
    seen = []
    for visits in ([3, 2], [0, 0], [0, 1]):  # samples of each process, in this step
        own = visits[rank]
        source.observe(3 * rank + np.arange(own), logits[:own], labels[:own], step=len(seen))
        source.share()
        seen.append(source.live["loss"].lookup(np.arange(7)).tolist())
    dist.destroy_process_group()
    return seen


def test_processes_agree_about_samples_that_diverged(tmp_path):
    first, second = run(__name__, "share_visits", tmp_path)
    assert first == second
    scores = np.array(first[0])
    assert np.isfinite(scores).all()
    assert scores[1] == scores[[2, 3, 4]].max()  # infinite: as hard as any
    known = scores[[1, 2, 3, 4]].mean()
    np.testing.assert_allclose(scores[[0, 5, 6]], known, rtol=1e-6)  # NaN, and not visited
