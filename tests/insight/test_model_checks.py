"""The finer points of the checks of a model: what is meant is no fault, what is a fault is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import learnloop as ll
from learnloop.testing import toy_learner
from tests.insight.test_check import Net, digits, mlp, regression


def found(learn, name):
    return learn.check(only=name)[name]


# Gradients


def test_a_branch_that_starts_at_zero_has_gradients_after_the_first_update():
    class ZeroAtFirst(Net):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.last.weight)

    assert found(digits(ZeroAtFirst), "gradients").verdict == "ok"


def test_parameters_without_gradient_are_named_and_counted():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 3)

    finding = found(digits(Unused), "gradients")
    assert (finding.verdict, finding.number) == ("fault", 2)
    assert finding.text == "`spare.weight`, `spare.bias` got no gradient: 2 of 8 trainable parameters."


def test_parameters_that_the_optimizer_does_not_have_are_named():
    learn = digits(Net, splitter=lambda model: [list(model.last.parameters())])
    finding = found(learn, "gradients")
    assert finding.verdict == "fault" and "in no group of the optimizer (4 of 6)" in finding.text


def test_frozen_parameters_need_no_gradient():
    learn = digits(Net, splitter={"first.*": {}, "norm.*": {}, "last.*": {}})
    learn.freeze()
    finding = found(learn, "gradients")
    assert finding.verdict == "ok" and learn.opt.frozen_idx == 2


def test_dead_units_have_gradients_of_zero():
    class Dead(Net):
        def between(self, x):
            return F.relu(x - 1e9)

    finding = found(digits(Dead), "gradients")
    assert finding.verdict == "warning" and "`first.weight`" in finding.text


def test_gradients_that_are_no_number_are_a_fault():
    class Infinite(Net):
        def forward(self, x):
            return super().forward(x) * float("inf")

    report = digits(Infinite).check(only=["gradients", "loss at start"])
    assert [f.verdict for f in report.findings.values()] == ["fault", "fault"]


# Modes


def test_frozen_statistics_that_are_meant_are_no_fault():
    from tests.insight.test_check import cnn

    assert found(digits(cnn, cbs=ll.BnFreeze()), "modes").verdict == "ok"


def test_dropout_that_is_meant_in_validation_is_no_fault():
    assert found(digits(cbs=ll.MCDropoutCallback()), "modes").verdict == "ok"


def test_a_learner_that_sets_no_mode_has_its_layers_in_the_wrong_one():
    finding = found(digits(default_cbs=False), "modes")
    assert (finding.verdict, finding.number) == ("fault", 1)


# Samples


def test_what_looks_at_the_whole_batch_in_training_only_is_good():
    from tests.insight.test_check import cnn

    assert found(digits(cnn), "samples apart").verdict == "ok"


def test_a_view_that_mixes_samples_is_found():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x.flatten(1).t().reshape(len(x), 64))

    assert found(digits(Mixing), "samples apart").verdict == "fault"


def test_batch_norm_without_statistics_is_found():
    model = lambda: nn.Sequential(  # noqa: E731
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32, track_running_stats=False), nn.Linear(32, 10)
    )
    assert found(digits(model), "samples apart").verdict == "fault"


# Losses


@pytest.mark.parametrize(
    ("last", "loss_func", "text"),
    [
        (nn.Softmax(1), nn.CrossEntropyLoss(), "takes a softmax, and the predictions have had one"),
        (nn.Identity(), nn.NLLLoss(), "takes log probabilities, and these do not sum to 1"),
    ],
)
def test_outputs_that_the_loss_does_not_take(last, loss_func, text):
    finding = found(digits(lambda: mlp(last), loss_func=loss_func), "outputs fit the loss")
    assert finding.verdict == "fault" and text in finding.text


def test_log_probabilities_fit_their_loss():
    assert found(digits(lambda: mlp(nn.LogSoftmax(1)), loss_func=nn.NLLLoss()), "outputs fit the loss").verdict == "ok"


def test_a_last_layer_that_cannot_reach_the_targets_is_found():
    finding = found(regression(nn.Sequential(nn.Linear(5, 1), nn.ReLU())), "outputs fit the loss")
    assert finding.verdict == "fault" and finding.text.endswith("and the model ends in Relu.")


def test_a_model_with_a_loss_of_its_own():
    class OwnLoss(Net):
        def forward(self, x, label=None):
            logits = super().forward(x)
            return {"logits": logits, "loss": F.cross_entropy(logits, label)}

    d = ll.datasets.digits()
    samples = [{"x": x, "label": y} for x, y in zip(d.x_train[:256], d.y_train[:256], strict=True)]
    loader = torch.utils.data.DataLoader(samples, 64, shuffle=True)
    torch.manual_seed(0)
    report = ll.Learner(ll.DataLoaders(loader, loader, device="cpu"), OwnLoss()).check(skip="loader speed")
    verdicts = {name: report[name].verdict for name in report}
    assert verdicts["loss at start"] == verdicts["one batch"] == verdicts["gradients"] == "ok"
    assert verdicts["learning"] == "not applicable"
    assert verdicts["no leak"] == "fault"  # it is validated on what it trains on


def test_callbacks_that_gather_mix_and_average_do_not_disturb():
    learn = digits(cbs=[ll.GradientAccumulation(256), ll.MixUp(), ll.EMA(), ll.GradientClip()])
    report = learn.check()
    assert report, report


def test_a_loss_without_targets_is_not_applicable():
    learn = toy_learner(loss_func=lambda pred, y: pred.mean())
    assert found(learn, "loss at start").verdict == "not applicable"
