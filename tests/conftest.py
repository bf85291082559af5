"""Settings of every test: tiny tensors gain nothing from threads, nothing is to be fetched, and no time is a failure,
since machines are shared."""

import gc
import os
from collections import defaultdict

import hypothesis
import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``quick(n)``: of a test's cases, n that lie evenly among them run by default; the others are thorough."""
    cases = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("quick"):
            cases[item.nodeid.partition("[")[0], *mark.args].append(item)
    for (_, count), group in cases.items():
        kept = {(2 * i + 1) * len(group) // (2 * count) for i in range(count)}
        for i, item in enumerate(group):
            if i not in kept:
                item.add_marker("thorough")


def pytest_collection_finish() -> None:
    """Every run of a Trainer collects garbage several times. What was imported until here is none, and looking through
    it took longer than most of the runs."""
    gc.collect()
    gc.freeze()
