"""Batches and predictions as pictures."""

import matplotlib
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import learnloop as ll
from learnloop.data.show import drawable, label_text
from learnloop.insight.samples import as_targets
from learnloop.testing import toy_learner

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


class Constant(nn.Module):
    """Predicts class 1 of three for everything."""

    def __init__(self):
        super().__init__()
        self.out = nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))

    def forward(self, x):
        return self.out.expand(len(x), 3)


def learner(x, vocab=("cat", "dog", "hen"), **kwargs):
    y = torch.arange(len(x)) % 3
    dls = ll.DataLoaders(DataLoader(TensorDataset(x, y), 4), ll.TensorLoader(x, y, bs=4), device="cpu")
    if vocab:
        dls.vocab = vocab
    return ll.Learner(dls, Constant(), nn.CrossEntropyLoss(), **kwargs)


def titles(fig):
    return [ax.get_title() for ax in fig.axes]


def test_a_batch_is_drawn_with_its_labels():
    x = torch.rand(9, 1, 5, 6)
    fig = learner(x).show_batch(max_n=3)
    assert titles(fig) == ["cat", "dog", "hen"]
    assert torch.equal(torch.tensor(fig.axes[1].images[0].get_array().data), x[1, 0])


def test_without_a_vocab_labels_are_numbers():
    assert titles(learner(torch.rand(4, 1, 5, 6), vocab=None).show_batch()) == ["0", "1", "2", "0"]


@pytest.mark.parametrize(("shape", "drawn"), [((3, 5, 6), (5, 6, 3)), ((1, 5, 6), (5, 6)), ((5, 6), (5, 6))])
def test_images_have_channels_or_none(shape, drawn):
    fig = learner(torch.rand(4, *shape)).show_batch(max_n=1)
    assert fig.axes[0].images[0].get_array().shape == drawn


def test_vectors_are_lines_and_anything_else_is_text():
    x = torch.rand(4, 7)
    fig = learner(x).show_batch(max_n=1)
    assert torch.equal(torch.tensor(fig.axes[0].lines[0].get_ydata()), x[0])
    words = learner(torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8]])).show_batch(max_n=1)
    assert [t.get_text() for t in words.axes[0].texts] == ["3 1 4"]
    deep = learner(torch.rand(4, 7, 2, 2)).show_batch(max_n=1)
    assert deep.axes[0].texts[0].get_text().replace("\n", " ") == "float32[7, 2, 2] cpu"


def test_predictions_stand_below_targets_green_where_they_agree():
    fig = learner(torch.rand(4, 1, 5, 6)).show_results()
    assert titles(fig) == ["cat\ndog", "dog\ndog", "hen\ndog", "cat\ndog"]
    assert [ax.title.get_color() for ax in fig.axes] == ["#c62828", "#2e7d32", "#c62828", "#c62828"]


def test_numbers_have_no_right_or_wrong():
    fig = toy_learner().show_results(max_n=2)
    assert [ax.title.get_color() for ax in fig.axes] == ["black", "black"]


def test_they_move_nothing():
    learn = learner(torch.rand(4, 1, 5, 6))
    state = torch.get_rng_state()
    learn.show_batch()
    learn.show_results()
    assert torch.equal(torch.get_rng_state(), state)
    assert learn.opt is None


def test_a_mapping_is_shown_by_its_keys():
    batches = [{"ids": torch.tensor([[3, 1], [4, 1]]), "labels": torch.tensor([0, 1])}]
    learn = ll.Learner(ll.DataLoaders(batches, batches, device="cpu"), lambda ids: ids.float(), nn.CrossEntropyLoss())
    fig = learn.show_batch()
    assert fig.axes[0].texts[0].get_text().split() == ["ids:", "3", "1", "labels:", "0"]
    assert titles(fig) == ["0", "1"]


def test_another_loader_can_be_shown():
    learn = learner(torch.rand(4, 1, 5, 6))
    dl = ll.TensorLoader(torch.rand(2, 1, 5, 6), torch.tensor([2, 2]), bs=2)
    assert titles(learn.show_batch(dl=dl)) == ["hen", "hen"]
    assert titles(learn.show_results(dl=dl)) == ["hen\ndog", "hen\ndog"]
    assert titles(learn.show_batch("valid", max_n=1)) == ["cat"]


def test_the_stream_of_a_hand_made_loader_is_shown_too():
    class Stream:
        def __iter__(self):
            yield torch.rand(2, 1, 5, 6), torch.tensor([1, 0])

    learn = learner(torch.rand(4, 1, 5, 6))
    learn.dls = ll.DataLoaders(Stream(), Stream(), device="cpu")
    assert titles(learn.show_batch()) == ["1", "0"]
    assert titles(learn.show_results()) == ["1\n1", "0\n1"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor(1), "dog"),
        (torch.tensor(0.12345), "0.123"),
        (torch.tensor([True, False, True]), "cat, hen"),
        (torch.tensor([[0, 1]]), "int64[1, 2] cpu"),
        ("free text", "free text"),
        (3, "3"),
    ],
)
def test_labels_in_words(value, text):
    assert label_text(["cat", "dog", "hen"], value) == text


def test_a_vector_of_numbers_is_a_label_too():
    assert label_text(None, torch.tensor([0.5, 1 / 3])) == "0.5, 0.333"


def test_plain_losses_leave_a_number_per_class_of_which_the_largest_is_meant():
    preds, targets = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([0, 1])
    assert as_targets(preds, targets).tolist() == [1, 0]
    assert as_targets(preds, torch.rand(2, 2)) is preds
    assert as_targets(preds, None) is preds


def test_of_several_inputs_the_first_is_drawn():
    image = torch.rand(1, 4, 4)
    assert drawable((image, torch.rand(3))) is image
