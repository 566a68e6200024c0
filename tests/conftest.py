"""What all tests share."""

import os
import signal

import pytest
import torch


def pytest_configure():
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: see `one_thread`
    os.environ.setdefault("WANDB_MODE", "offline")  # the package reads it once per process, for all tests that follow
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs: many tests press Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Small batches gain nothing from several threads, and several tests at once lose much."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)
