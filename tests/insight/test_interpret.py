"""Interpretation. Losses are compared with torch, the confusion matrix with scikit-learn."""

import matplotlib
import numpy as np
import pytest
import torch
from fastcore.basics import noop
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import learnloop as ll

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


N = 24


def data():
    torch.manual_seed(0)
    return torch.rand(N, 1, 4, 4), torch.arange(N) % 3


def loaders_of(kind):
    """The same samples in several kinds of loaders."""
    x, y = data()
    if kind == "ours":
        train, valid = ll.TensorLoader(x, y, bs=8, shuffle=True), ll.TensorLoader(x, y, bs=10)
    elif kind == "torch":
        train, valid = (DataLoader(TensorDataset(x, y), 10, shuffle=True) for _ in range(2))
    elif kind == "a part":
        train = DataLoader(TensorDataset(x, y), 8)
        valid = DataLoader(TensorDataset(x, y), 10, sampler=SubsetRandomSampler(range(N - 1, 3, -1)))
    elif kind == "a list":
        train = valid = [(x[i : i + 10], y[i : i + 10]) for i in range(0, N, 10)]
    else:
        train = [{"x": x, "labels": y}]
        valid = [{"x": x[i : i + 10], "labels": y[i : i + 10]} for i in range(0, N, 10)]
    return ll.DataLoaders(train, valid, device="cpu")


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))


def learner(kind="ours", loss_func=None, vocab=("a", "b", "c")):
    dls = loaders_of(kind)
    if vocab is not None:
        dls.vocab = vocab
    learn = ll.Learner(dls, Flat(), ll.CrossEntropyLossFlat() if loss_func is None else loss_func)
    learn.logger = noop
    return learn


KINDS = ["ours", "torch", "a part", "a list", "a mapping"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_its_loss_its_prediction_and_its_input(kind):
    learn = learner(kind)
    x, y = (t[4:] if kind == "a part" else t for t in data())
    found = ll.Interpretation.from_learner(learn)
    with torch.no_grad():
        logits = learn.model(x)
    torch.testing.assert_close(found.losses, F.cross_entropy(logits, y, reduction="none"))
    inputs, preds, targets, decoded, losses = found[[5, 2, 17]]
    inputs = inputs["x"] if kind == "a mapping" else inputs
    assert torch.equal(inputs, x[[5, 2, 17]])
    torch.testing.assert_close(preds, logits.softmax(1)[[5, 2, 17]])
    assert torch.equal(targets, y[[5, 2, 17]])
    assert torch.equal(decoded, logits.argmax(1)[[5, 2, 17]])
    assert torch.equal(losses, found.losses[[5, 2, 17]])


@pytest.mark.parametrize("kind", KINDS)
def test_top_losses_come_with_the_numbers_of_their_samples(kind):
    found = ll.Interpretation.from_learner(learner(kind))
    losses, idxs, items = found.top_losses(4, items=True)
    assert losses.tolist() == found.losses.sort(descending=True).values[:4].tolist()
    assert torch.equal(found.losses[idxs], losses)
    for item, i in zip(items, idxs.tolist(), strict=True):
        x = item["x"] if kind == "a mapping" else item[0]
        assert torch.equal(x, data()[0][i + (4 if kind == "a part" else 0)])


def test_the_smallest_losses_and_all_of_them():
    found = ll.Interpretation.from_learner(learner())
    losses, _ = found.top_losses(largest=False)
    assert losses.tolist() == found.losses.sort().values.tolist()
    assert len(found.top_losses(1000)[0]) == N


def test_nothing_of_the_learner_moves():
    learn = learner("torch")
    learn.fit(1)
    before = torch.get_rng_state(), learn.train_iter, len(learn.recorder.values), learn.model.training
    ll.ClassificationInterpretation.from_learner(learn).plot_top_losses(3)
    after = torch.get_rng_state(), learn.train_iter, len(learn.recorder.values), learn.model.training
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_one_made_by_hand_predicts_when_it_is_asked():
    learn = learner()
    whole = ll.Interpretation.from_learner(learn)
    by_hand = ll.Interpretation(learn, learn.dls.valid, whole.losses)
    assert torch.equal(by_hand.preds, whole.preds)
    assert repr(by_hand) == f"Interpretation(24 samples, mean loss {whole.losses.mean():.4f})"


def test_another_set_and_another_activation():
    learn = learner()
    found = ll.Interpretation.from_learner(learn, ds_idx="train", act=torch.zeros_like)
    assert found.preds.eq(0).all()
    dl = ll.TensorLoader(*(t[:5] for t in data()), bs=2)
    assert len(ll.Interpretation.from_learner(learn, dl=dl)) == 5


def test_without_a_validation_set_it_says_so():
    learn = learner()
    learn.dls = ll.DataLoaders(learn.dls.train)
    with pytest.raises(ValueError, match="there is no validation loader"):
        ll.Interpretation.from_learner(learn)


def test_top_losses_are_drawn_with_prediction_target_loss_and_probability():
    found = ll.ClassificationInterpretation.from_learner(learner())
    fig = found.plot_top_losses(4)
    losses, idxs = found.top_losses(4)
    i = int(idxs[0])
    decoded, target = int(found.decoded[i]), int(found.targets[i])
    title = f"{'abc'[decoded]} / {'abc'[target]}\n{losses[0]:.2f} / {found.preds[i, decoded]:.2f}"
    assert fig.axes[0].get_title() == title
    assert fig.axes[0].images[0].get_array().shape == (4, 4)
    assert len(fig.axes) == 4
    assert [ax.title.get_color() for ax in fig.axes] == [
        "#2e7d32" if found.decoded[i] == found.targets[i] else "#c62828" for i in idxs
    ]


def test_a_range_draws_those_places_of_the_order():
    found = ll.Interpretation.from_learner(learner())
    fig = found.plot_top_losses(range(3, 5))
    assert [ax.get_title().split("\n")[1] for ax in fig.axes] == [f"{v:.2f}" for v in found.top_losses()[0][3:5]]


def test_show_results_draws_some_samples():
    found = ll.ClassificationInterpretation.from_learner(learner())
    titles = [ax.get_title() for ax in found.show_results([0, 7]).axes]
    assert titles == [f"{'abc'[found.targets[i]]}\n{'abc'[found.decoded[i]]}" for i in (0, 7)]


# Classes


def expected_matrix(learn):
    x, y = data()
    with torch.no_grad():
        return confusion_matrix(y, learn.model(x).argmax(1), labels=[0, 1, 2])


@pytest.mark.parametrize("loss_func", [None, nn.CrossEntropyLoss(), F.cross_entropy])
@pytest.mark.parametrize("vocab", [None, ("a", "b", "c")])
def test_the_confusion_matrix_is_that_of_scikit_learn(loss_func, vocab):
    learn = learner(loss_func=loss_func, vocab=vocab)
    found = ll.ClassificationInterpretation.from_learner(learn)
    assert found.confusion_matrix().tolist() == expected_matrix(learn).tolist()


def test_the_most_confused_come_first():
    learn = learner()
    found = ll.ClassificationInterpretation.from_learner(learn)
    matrix = expected_matrix(learn)
    np.fill_diagonal(matrix, 0)
    pairs = found.most_confused()
    assert {(a, p): n for a, p, n in pairs} == {
        ("abc"[i], "abc"[j]): matrix[i, j] for i in range(3) for j in range(3) if matrix[i, j]
    }
    assert [n for _, _, n in pairs] == sorted((n for _, _, n in pairs), reverse=True)
    most = pairs[0][2]
    assert found.most_confused(most + 1) == []


def test_a_class_without_samples_is_a_row_of_zeros_also_in_parts():
    learn = learner(vocab=("a", "b", "c", "d"))
    found = ll.ClassificationInterpretation.from_learner(learn)
    (ax,) = found.plot_confusion_matrix(normalize=True).axes
    parts = ax.images[0].get_array()
    assert parts[3].tolist() == [0, 0, 0, 0]
    assert parts[:3].sum(1).tolist() == pytest.approx([1, 1, 1])


def test_the_picture_of_the_matrix_has_names_and_numbers():
    learn = learner()
    found = ll.ClassificationInterpretation.from_learner(learn)
    (ax,) = found.plot_confusion_matrix(title="who is who").axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.texts] == [str(n) for n in expected_matrix(learn).flatten()]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("who is who", "Predicted", "Actual")
    (bare,) = found.plot_confusion_matrix(plot_txt=False, figsize=(3, 3)).axes
    assert len(bare.texts) == 0


def test_the_report_of_scikit_learn_is_printed(capsys):
    ll.ClassificationInterpretation.from_learner(learner(vocab=("a", "b", "c", "never"))).print_classification_report()
    shown = capsys.readouterr().out
    assert "precision    recall  f1-score   support" in shown
    assert "never       0.00      0.00      0.00         0" in shown


def test_too_few_names_and_other_targets_are_errors_that_say_so():
    found = ll.ClassificationInterpretation.from_learner(learner(vocab=("a", "b")))
    with pytest.raises(ValueError, match="`vocab` names 2 classes, and there is a class 2"):
        found.confusion_matrix()
    learn = learner()
    learn.dls = ll.DataLoaders(*(ll.TensorLoader(data()[0], torch.rand(N, 3), bs=8) for _ in range(2)), device="cpu")
    learn.loss_func = nn.MSELoss()
    numbers = ll.ClassificationInterpretation.from_learner(learn)
    numbers._gathered = numbers.preds, numbers.targets[:, 0], numbers.decoded
    with pytest.raises(ValueError, match=r"needs one class per sample; predictions are of shape \(24, 3\)"):
        numbers.confusion_matrix()


def test_a_probability_is_the_softmax_where_the_loss_has_no_activation():
    found = ll.ClassificationInterpretation.from_learner(learner(loss_func=nn.CrossEntropyLoss()))
    title = found.plot_top_losses(1).axes[0].get_title()
    i = int(found.top_losses(1)[1])
    assert title.endswith(f" / {found.preds[i].softmax(0).max():.2f}")


def test_a_regression_has_no_confusion_matrix_and_says_so():
    learn = learner(loss_func=nn.MSELoss())
    learn.dls = ll.DataLoaders(*(ll.TensorLoader(data()[0], torch.rand(N, 3), bs=8) for _ in range(2)), device="cpu")
    found = ll.ClassificationInterpretation.from_learner(learn)
    with pytest.raises(
        ValueError, match=r"^a confusion matrix needs classes; predictions are float32, targets float32\."
    ):
        found.plot_confusion_matrix()


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_top_losses_are_so_many(k):
    with pytest.raises(ValueError, match=rf"^`k={k}`: pass how many samples, 1 or more, or None for all of them\.$"):
        ll.Interpretation.from_learner(learner()).top_losses(k)


def test_what_is_no_learner_is_refused():
    with pytest.raises(TypeError, match=r"^this looks into a Learner, and got something of type Linear\.$"):
        ll.Interpretation.from_learner(nn.Linear(2, 2))
