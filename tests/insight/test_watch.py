"""What counts as written and as read, seen through dry runs."""

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import Callback
from learnloop.testing import toy_learner


def seen(event, handler, what="writes", **kwargs):
    """What a handler writes at an event of a bare learner, or what it reads."""
    learn = toy_learner(cbs=Callback(**{event: handler}), default_cbs=False, **kwargs)
    return next(getattr(row, what) for row in learn.dry_run(2).rows if row.event == event)


# Tensors


@pytest.mark.parametrize(
    ("event", "name", "handler"),
    [
        ("before_batch", "xb", lambda cb: cb.xb[0].mul_(2)),
        ("before_batch", "yb", lambda cb: cb.y.add_(1)),
        ("after_pred", "pred", lambda cb: setattr(cb.learn, "pred", cb.pred * 2)),
        ("after_pred", "pred", lambda cb: cb.pred.detach().mul_(2)),
        ("after_loss", "loss", lambda cb: cb.loss.mul_(2)),
        ("after_loss", "loss", lambda cb: setattr(cb.learn, "loss", cb.loss * 2)),
        ("after_loss", "loss_grad", lambda cb: setattr(cb.learn, "loss_grad", cb.loss_grad * 2)),
        ("after_backward", "gradients", lambda cb: cb.model[0].weight.grad.zero_()),
        ("after_backward", "gradients", lambda cb: setattr(cb.model[0].weight, "grad", None)),
        ("before_fit", "requires_grad", lambda cb: cb.model[0].requires_grad_(False)),
    ],
)
def test_what_a_handler_does_to_the_batch_and_gradients_is_seen(event, name, handler):
    assert seen(event, handler) == (name,)


def test_weights_are_seen_to_change_in_place():
    def shrink(cb):
        with torch.no_grad():
            cb.model[0].weight.mul_(0.5)

    assert seen("after_step", shrink) == ("parameters",)


def test_weights_are_seen_to_change_through_data_which_torch_does_not_count():
    assert seen("after_step", lambda cb: cb.model[0].weight.data.mul_(0.5)) == ("parameters",)


def test_a_loss_that_is_only_read_is_not_written():
    assert seen("after_loss", lambda cb: (cb.loss, cb.loss_grad)) == ()


# What is set


def test_setting_the_same_object_again_counts():
    assert seen("before_batch", lambda cb: setattr(cb.learn, "xb", cb.xb)) == ("xb",)


def test_what_the_same_handler_puts_back_does_not_count():
    def there_and_back(cb):
        former = cb.learn.loss_func
        cb.learn.loss_func = nn.L1Loss()
        cb.learn.loss_func = former

    assert seen("before_batch", there_and_back) == ()


def test_new_and_deleted_attributes_are_seen():
    assert seen("before_fit", lambda cb: setattr(cb.learn, "mine", 1)) == ("mine",)
    assert seen("before_epoch", lambda cb: vars(cb.learn).pop("path", None)) == ("path",)


def test_lists_of_the_learners_are_seen_to_grow():
    learn = toy_learner(cbs=Callback(after_batch=lambda cb: cb.learn.mine.append(1)))
    learn.mine = []
    assert learn.dry_run().writes["Callback"] == {"after_batch": ("mine",)}
    assert learn.mine == []


def test_a_callbacks_own_attributes_are_no_writes():
    assert seen("before_fit", lambda cb: setattr(cb, "mine", 1)) == ()


def test_those_of_another_one_are():
    learn = toy_learner(cbs=Callback(before_fit=lambda cb: setattr(cb.learn.recorder, "train_metrics", True)))
    assert learn.dry_run().writes["Callback"] == {"before_fit": ("recorder.train_metrics",)}


def test_metrics_are_seen_to_be_replaced():
    assert seen("before_fit", lambda cb: setattr(cb.learn, "metrics", [ll.accuracy])) == ("metrics",)


# Optimizer, model, surroundings


@pytest.mark.parametrize(
    ("name", "handler"),
    [
        ("opt.lr", lambda cb: cb.opt.set_hyper("lr", 0.1)),  # which it has already
        ("opt.lr", lambda cb: cb.opt.set_hypers(lr=0.2)),
        ("opt.lr", lambda cb: cb.opt.hypers[0].update(lr=0.3)),
        ("opt.wd", lambda cb: cb.opt.param_groups[0].update(wd=0.3)),
        ("gradients", lambda cb: cb.opt.zero_grad()),
        ("model.training", lambda cb: cb.model.train(cb.model.training)),
        ("model.training", lambda cb: setattr(cb.model[0], "training", not cb.model[0].training)),
        ("hooks", lambda cb: cb.model[0].register_forward_hook(lambda *_: None)),
        ("model.in_features", lambda cb: setattr(cb.model[0], "in_features", 7)),
        ("random state", lambda cb: torch.rand(1)),
        ("random state", lambda cb: torch.default_generator.manual_seed(0)),
        ("opt", lambda cb: cb.learn.create_opt()),
    ],
)
def test_what_a_handler_does_to_optimizer_model_and_generators_is_seen(name, handler):
    assert name in seen("before_fit", handler)


def test_momenta_of_the_optimizer_are_seen():
    def clear(cb):
        cb.opt.clear_state()

    assert seen("before_validate", clear, opt_func=ll.Adam) == ("opt.state",)


def test_what_a_nested_run_leaves_behind_is_its_callers():
    def validates(cb):
        cb.learn.validate()
        cb.learn.mine = 1

    assert seen("after_batch", validates) == ("mine",)


def test_a_file_that_the_learner_would_save_is_seen_and_not_written(tmp_path):
    assert seen("after_epoch", lambda cb: cb.learn.save("here"), path=tmp_path) == ("a file",)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_just_saved_are_loaded_in_name_only(tmp_path):
    def there_and_back(cb):
        cb.learn.save("here")
        cb.learn.load("here")

    assert seen("after_epoch", there_and_back, path=tmp_path) == ("a file", "parameters")


def test_a_file_from_before_is_loaded(tmp_path):
    learn = toy_learner(path=tmp_path)
    learn.save("before")
    assert learn.dry_run(cbs=Callback(before_fit=lambda cb: cb.learn.load("before"))).writes["Callback"] == {
        "before_fit": ("parameters",)
    }


# Reading


def test_what_is_read_is_told_by_the_name_of_what_is_meant():
    assert seen("after_loss", lambda cb: (cb.x, cb.learn.y, cb.loss, cb.learn.iter), "reads") == (
        *("iter", "loss", "xb", "yb"),
    )


def test_methods_and_what_the_loop_reads_are_left_out():
    def calls(cb):
        cb.learn._grab_cbs(ll.Recorder)
        cb.learn.ordered_cbs("before_fit")

    assert seen("before_batch", calls, "reads") == ()


def test_a_compiled_model_runs_as_it_was_written():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    learn = toy_learner(cbs=ll.Compile(backend=backend))
    assert learn.dry_run().writes["Compile"]["before_fit"] == ("model.forward",)
    assert calls == []
