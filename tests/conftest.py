"""Settings of every test: tiny tensors gain nothing from threads, and nothing is to be fetched."""

import os

import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
