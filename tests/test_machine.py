"""What a process runs on."""

import pytest
import torch
from torch import distributed

from learnloop.machine import environment, ismin_torch, notmax_torch, num_distrib, rank_distrib


@pytest.fixture
def started(monkeypatch):
    """Sets the variables that torchrun sets."""

    def start(rank, size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return start


def test_a_process_alone_has_rank_0_of_0(started):
    assert (rank_distrib(), num_distrib()) == (0, 0)


def test_a_process_knows_its_rank_from_torchrun_before_its_group_exists(started):
    started(2, 4)
    assert (rank_distrib(), num_distrib()) == (2, 4)


def test_the_group_knows_better_than_the_environment(started):  # fastai reads the environment only
    started(2, 4)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert (rank_distrib(), num_distrib()) == (0, 1)
    finally:
        distributed.destroy_process_group()


def test_versions_of_torch_are_compared_as_numbers(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0+cpu"))
    assert [ismin_torch(v) for v in ("2.9", "2.13", "2.13.0", "2.13.1", "3")] == [True, True, True, False, False]
    assert [notmax_torch(v) for v in ("2.9", "2.13", "2.13.0", "2.13.1", "3")] == [False, False, False, True, True]


@pytest.mark.parametrize("version", ["parrot", "", 2.11, None])
def test_what_is_no_version_is_refused(version):
    with pytest.raises(ValueError, match="is no version of torch; pass one as a string"):
        ismin_torch(version)


def test_the_environment_names_versions_and_hardware():
    found = environment()
    assert list(found) == ["python", "torch", "platform", "cpu", "threads", "gpu"]
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
    assert found["cpu"] and (found["gpu"] is None) == (not torch.cuda.is_available())
