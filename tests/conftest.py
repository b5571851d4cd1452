"""Small real experts, built once per test session; no network, no mocks."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two at a time
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = "error"

import pytest
import torch
from tiny import sd_unet

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 50)  # the libraries keep half a million objects: a full collection takes a quarter of a second


@pytest.fixture(scope="session")
def three_unets():
    return [sd_unet(seed) for seed in range(3)]


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """The garbage collector leaves alone what lived before a module: looking at 500,000 imported objects takes .3 s each time."""
    gc.collect()
    gc.freeze()
