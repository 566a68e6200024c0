"""One seed for every generator."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from learnloop import SGD, DataLoaders, Learner, TensorLoader, TrainEvalCallback
from learnloop.data.keyed import random_states, set_random_states
from learnloop.seeds import set_seed
from tests.toys import weights

X = torch.linspace(-1, 1, 24)[:, None]


@pytest.fixture(autouse=True)
def put_back():
    """The generators as they were."""
    states = random_states()
    yield
    set_random_states(states)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_one_seed_sets_the_generators_of_python_numpy_and_torch():
    set_seed(5)  # these are fastai's numbers too
    assert draw() == (random.Random(5).random(), np.random.RandomState(5).rand(), 0.8302518725395203)


def test_the_same_seed_draws_the_same_numbers_again():
    set_seed(3)
    first = draw()
    assert draw() != first
    set_seed(np.int64(3))
    assert draw() == first


def test_every_accelerator_is_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    set_seed(7)
    assert seeded == [7]


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**32 - 1, 2**32, 2**64 - 1])
def test_seeds_of_up_to_64_bits_are_taken(seed):
    set_seed(seed)
    assert np.random.rand() == np.random.RandomState(seed % 2**32).rand()


def test_a_negative_seed_is_another_than_its_opposite():  # random.seed takes the absolute value, and so does fastai
    set_seed(-1)
    minus = draw()
    set_seed(1)
    assert all(a != b for a, b in zip(minus, draw(), strict=True))


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(TypeError, match=r"a seed is a whole number"):
        set_seed(seed)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_has_at_most_64_bits(seed):
    before = random.getstate()
    with pytest.raises(ValueError, match=r"torch takes seeds from -2\*\*63 to 2\*\*64 - 1"):
        set_seed(seed)
    assert random.getstate() == before


class Noisy(Dataset):
    """Samples that draw from all three generators."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + random.random() + np.random.rand() + torch.rand(1), X[i]


LOADERS = {
    "TensorLoader": lambda: DataLoaders(TensorLoader(X, X**2, bs=4, shuffle=True), device="cpu"),
    "DataLoader": lambda: DataLoaders(DataLoader(Noisy(), 4, shuffle=True), device="cpu"),
    "unkeyed": lambda: DataLoaders(DataLoader(Noisy(), 4, shuffle=True), device="cpu", keyed=False),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_training_after_the_same_seed_gives_the_same_weights_to_the_bit(kind):
    def trained(seed):
        set_seed(seed)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        learn = Learner(
            LOADERS[kind](), model, nn.MSELoss(), opt_func=SGD, lr=0.1, cbs=TrainEvalCallback, default_cbs=False
        )
        learn.fit(1)
        return weights(learn)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


# reproducible


@pytest.fixture
def settings(monkeypatch):
    """Torch's settings as they are at first; put back after the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def chosen():
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_a_seed_alone_chooses_no_algorithms(settings):
    set_seed(1)
    assert chosen() == (False, False, True, None)


def test_a_reproducible_seed_chooses_algorithms_that_repeat(settings):
    set_seed(1, reproducible=True)
    assert chosen() == (True, True, False, ":4096:8")


def test_a_workspace_that_is_set_stays(settings):
    settings.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_seed(1, reproducible=True)
    assert chosen() == (True, True, False, ":16:8")


def test_an_operation_that_cannot_repeat_is_refused_until_it_may_warn(settings):
    set_seed(1, reproducible=True)
    x, index = torch.zeros(3), torch.tensor([0, 0])
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        x.put_(index, torch.tensor([1.0, 2.0]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
        x.put_(index, torch.tensor([1.0, 2.0]))
