"""Settings of every test: tiny tensors gain nothing from threads, nothing is to be fetched, and no time is a failure,
since machines are shared."""

import gc
import os

import hypothesis
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Every run of a Trainer collects garbage several times. What was imported until here is none, and looking through
    it took longer than most of the runs."""
    gc.collect()
    gc.freeze()
