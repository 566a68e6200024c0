"""Predictions over a set, and the callbacks that gather and fetch them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnloop import (
    BatchTransform,
    Callback,
    CancelBatchException,
    CancelFitException,
    CrossEntropyLossFlat,
    DataLoaders,
    FetchPredsCallback,
    GatherPredsCallback,
    Learner,
    TensorLoader,
)
from learnloop.testing import check_callback, toy_learner
from tests.toys import Heard, raise_at, raising

X, Y = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 3


def classifier(loss_func=None, dataset=None, **kwargs):
    """Four numbers into one of three classes; shuffled training, and a validation of the first 20 samples."""
    torch.manual_seed(0)
    dataset = TensorDataset(X, Y) if dataset is None else dataset
    train = DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True)
    dls = DataLoaders(train, TensorLoader(X[:20], Y[:20], bs=8), device="cpu")
    loss_func = CrossEntropyLossFlat() if loss_func is None else loss_func
    learn = Learner(dls, nn.Linear(4, 3), loss_func, default_cbs=False, **kwargs)
    learn.model.eval()
    return learn


def test_predictions_come_through_the_activation_of_the_loss_with_the_targets():
    learn = classifier()
    preds, targets = learn.get_preds()
    assert torch.equal(targets, Y[:20])
    torch.testing.assert_close(preds, learn.model(X[:20]).detach().softmax(1))
    assert not preds.requires_grad


def test_a_loss_without_activation_leaves_the_outputs_as_they_are():
    learn = classifier(nn.CrossEntropyLoss())
    torch.testing.assert_close(learn.get_preds()[0], learn.model(X[:20]).detach())


def test_an_activation_of_ones_own_goes_before_that_of_the_loss():
    learn = classifier()
    torch.testing.assert_close(learn.get_preds(act=torch.sigmoid)[0], learn.model(X[:20]).detach().sigmoid())


def test_everything_that_can_be_asked_for_comes_in_fastais_order():
    learn = classifier()
    inputs, preds, targets, decoded, losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    logits = learn.model(X[:20]).detach()
    assert torch.equal(inputs, X[:20])
    assert torch.equal(targets, Y[:20])
    assert torch.equal(decoded, preds.argmax(1))
    torch.testing.assert_close(losses, F.cross_entropy(logits, Y[:20], reduction="none"))


def test_the_training_set_is_predicted_in_its_order_and_whole():
    learn = classifier()
    preds, targets = learn.get_preds(ds_idx=0)
    assert torch.equal(targets, Y)
    torch.testing.assert_close(preds, learn.model(X).detach().softmax(1))


@pytest.mark.parametrize(
    "order", [{"sampler": [40, 3, 27, 9]}, {"batch_sampler": [[40, 3, 27], [9]]}], ids=["sampler", "batches"]
)
def test_samples_of_a_custom_order_come_back_in_that_of_the_dataset(order):
    options = order if "batch_sampler" in order else {**order, "batch_size": 3}
    dl = DataLoader(TensorDataset(X, torch.arange(50)), **options)
    learn = classifier(nn.CrossEntropyLoss(reduction="none"))
    learn.loss_func = lambda pred, y: pred.sum()
    preds, targets = learn.get_preds(dl=dl)
    assert targets.tolist() == [3, 9, 27, 40]
    torch.testing.assert_close(preds, learn.model(X[[3, 9, 27, 40]]).detach())
    assert learn.get_preds(dl=dl, reorder=False)[1].tolist() == [40, 3, 27, 9]


def test_a_batch_that_was_cancelled_is_left_out_and_the_rest_keeps_its_order():
    class Second(Callback):
        def before_batch(self):
            if self.iter == 1:
                raise CancelBatchException

    dl = DataLoader(TensorDataset(X, Y), batch_size=2, sampler=[40, 3, 27, 9, 5, 1])
    inputs, _, _ = classifier().get_preds(dl=dl, with_input=True, cbs=Second())
    assert torch.equal(inputs, X[[1, 3, 5, 40]])


def test_predictions_cancelled_as_a_whole_are_none():
    assert classifier().get_preds(cbs=raise_at("before_batch", CancelFitException)) == (None, None)


def test_batches_without_targets_give_none():
    preds, targets = classifier().get_preds(dl=DataLoader(X[:5], batch_size=2))
    assert preds.shape == (5, 3)
    assert targets is None


def test_a_list_of_batches_and_an_iterator_do_as_loaders():
    learn = classifier()
    batches = [(X[:3], Y[:3]), (X[3:5], Y[3:5])]
    assert torch.equal(learn.get_preds(dl=batches)[1], Y[:5])
    assert torch.equal(learn.get_preds(dl=iter(batches))[1], Y[:5])


def test_two_outputs_and_two_targets_come_as_tuples():
    class Two(nn.Module):
        def forward(self, x):
            return x[:, :1], x[:, 1:]

    dls = DataLoaders(*[TensorLoader(X, Y, -Y, bs=8, n_inp=1)] * 2, device="cpu")
    learn = Learner(dls, Two(), lambda pred, y1, y2: pred[0].mean(), default_cbs=False)
    (first, second), (y1, y2) = learn.get_preds()
    assert torch.equal(torch.cat([first, second], 1), X)
    assert torch.equal(y1, Y) and torch.equal(y2, -Y)


def test_predictions_of_several_lengths_come_one_by_one():
    learn = Learner(DataLoaders([]), lambda x: x * 2, default_cbs=False)
    preds, _ = learn.get_preds(dl=[torch.ones(2, 3), torch.ones(1, 4)])
    assert [p.tolist() for p in preds] == [[2, 2, 2], [2, 2, 2], [2, 2, 2, 2]]


def test_a_loss_with_several_values_per_sample_is_averaged_over_each():
    learn = toy_learner(model=nn.Linear(2, 3), loss_func=nn.MSELoss())
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    losses = learn.get_preds(dl=[(x, y)], with_loss=True)[2]
    torch.testing.assert_close(losses, ((learn.model(x) - y) ** 2).mean(1).detach())
    assert learn.loss_func.reduction == "mean"


def test_a_loss_function_with_a_reduction_argument_gives_losses_and_is_put_back():
    learn = classifier(F.cross_entropy)
    expected = F.cross_entropy(learn.model(X[:20]), Y[:20], reduction="none").detach()
    torch.testing.assert_close(learn.get_preds(with_loss=True)[2], expected)
    assert learn.loss_func is F.cross_entropy


def test_the_loss_is_put_back_after_an_error():
    learn = classifier()
    with pytest.raises(OSError):
        learn.get_preds(with_loss=True, cbs=raise_at("after_loss", OSError("no")))
    assert learn.loss_func.reduction == "mean"


def test_loss_not_reduced_is_a_context():
    learn = classifier()
    with learn.loss_not_reduced():
        assert learn.loss_func(learn.model(X), Y).shape == (50,)
    assert learn.loss_func(learn.model(X), Y).shape == ()


def test_a_folder_gets_a_file_per_batch_and_memory_nothing(tmp_path):
    learn = classifier()
    options = {"save_preds": tmp_path / "preds", "save_targs": tmp_path / "targets"}
    assert learn.get_preds(**options, with_preds=False, with_targs=False) == (None, None)
    assert sorted(p.name for p in tmp_path.glob("*/*")) == ["0", "0", "1", "1", "2", "2"]
    logits = torch.cat([torch.load(tmp_path / "preds" / str(i)) for i in range(3)])
    torch.testing.assert_close(logits, learn.model(X[:20]).detach())
    assert torch.equal(torch.cat([torch.load(tmp_path / "targets" / str(i)) for i in range(3)]), Y[:20])


def test_saving_does_not_keep_from_returning(tmp_path):
    preds, targets = classifier().get_preds(save_preds=str(tmp_path))
    assert (preds.shape, targets.shape) == ((20, 3), (20,))


def test_files_of_an_earlier_longer_run_do_not_stay_among_the_new_ones(tmp_path):
    (tmp_path / "notes.txt").touch()
    learn = classifier()
    learn.get_preds(ds_idx=0, save_preds=tmp_path)
    learn.get_preds(save_preds=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "notes.txt"]


def test_predictions_move_nothing_of_a_training():
    learn = classifier()
    learn.add_cb(Heard())
    learn.fit(1)
    state, before = torch.get_rng_state(), dict(learn.state_dict()["counters"])
    learn.model.train()
    learn.get_preds()
    assert torch.equal(torch.get_rng_state(), state)
    assert learn.state_dict()["counters"] == before
    assert learn.model.training
    assert (learn.task, learn.pred, learn.dl) == (None, None, None)


def test_the_events_are_those_of_a_validation_in_a_fit_and_an_epoch():
    heard = Heard()
    classifier().get_preds(dl=[(X[:2], Y[:2])], cbs=heard)
    assert [e for e in heard.events if not e.startswith("cleanup")] == [
        *("before_fit", "before_epoch", "before_validate"),
        *("before_batch", "after_pred", "after_loss", "after_batch"),
        *("after_validate", "after_epoch", "after_fit"),
    ]


def test_inner_predictions_have_no_fit_and_no_epoch_around_them():
    heard = Heard()
    classifier().get_preds(dl=[(X[:2], Y[:2])], cbs=heard, inner=True)
    assert [e for e in heard.events if not e.startswith("cleanup")] == [
        *("before_validate", "before_batch", "after_pred", "after_loss", "after_batch", "after_validate")
    ]


def test_the_gatherer_is_known_before_anyones_before_fit():
    class Asks(Callback):
        order = -100

        def before_fit(self):
            self.found = hasattr(self, "gather_preds"), self.learn.task

    asks = Asks()
    learn = classifier(cbs=asks)
    learn.get_preds()
    assert asks.found == (True, "predict")
    assert not hasattr(learn, "gather_preds")


def test_metrics_are_not_computed_for_predictions():
    learn = toy_learner(metrics=lambda pred, y: raising(AssertionError)(None))
    assert learn.get_preds()[0].shape == (16, 1)


def test_predictions_without_any_loss_function():
    assert torch.equal(Learner(DataLoaders([]), lambda x: -x).get_preds(dl=[(X, Y)])[0], -X)


@pytest.mark.parametrize(
    ("loss_func", "options", "message"),
    [
        (lambda pred, y: pred.mean(), {"with_loss": True}, "reduction"),
        (nn.CrossEntropyLoss(), {"with_decoded": True, "with_preds": False}, "leave out `with_preds=False`"),
        (nn.CrossEntropyLoss(), {"with_loss": True, "dl": [X]}, "`with_loss` needs targets"),
    ],
)
def test_what_cannot_be_given_says_why(loss_func, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classifier(loss_func).get_preds(**options)


def test_a_model_that_makes_its_own_loss_has_none_per_sample():
    learn = Learner(DataLoaders([(X, Y)]), nn.Linear(4, 3), default_cbs=False)
    with pytest.raises(ValueError, match="`loss_func` is None: the model reduces its own"):
        learn.get_preds(0, with_loss=True)


def test_a_loss_that_ignores_reduction_is_named():
    learn = classifier(lambda pred, y, reduction="mean": F.cross_entropy(pred, y))
    with pytest.raises(ValueError, match=r"gave shape \(\) for 8 samples"):
        learn.get_preds(with_loss=True)


def test_without_a_validation_loader_it_says_what_to_pass():
    with pytest.raises(ValueError, match="there is no validation loader"):
        Learner(DataLoaders([(X, Y)]), nn.Linear(4, 3), nn.CrossEntropyLoss()).get_preds()


# One item


def test_predict_gives_label_class_and_probabilities_of_one_item():
    learn = classifier()
    label, decoded, pred = learn.predict(X[7])
    torch.testing.assert_close(pred, learn.model(X[7]).detach().softmax(0))
    assert decoded == label == pred.argmax()


def test_predict_reads_the_label_from_the_vocabulary():
    learn = classifier()
    learn.dls.vocab = ["red", "green", "blue"]
    label, decoded, _ = learn.predict(X[7])
    assert label == learn.dls.vocab[decoded]


def test_predict_takes_a_whole_sample_and_gives_back_its_input():
    item, _, _, pred = classifier().predict((X[7], Y[7]), with_input=True)
    assert torch.equal(item, X[7])
    assert pred.shape == (3,)


# The callbacks by themselves


def test_a_gatherer_in_a_fit_holds_the_last_validation():
    gather = GatherPredsCallback()
    learn = classifier(cbs=gather)
    learn.fit(2)
    torch.testing.assert_close(gather.preds, learn.model(X[:20]).detach())
    assert gather.all_tensors()[1].tolist() == Y[:20].tolist()


def test_predictions_are_fetched_after_each_validation_with_the_weights_of_that_epoch():
    fetch = FetchPredsCallback(ds_idx=0, with_decoded=True)
    seen = []

    class Look(Callback):
        order = 1

        def after_validate(self):
            if self.learn.task == "fit":  # not that of the fetching itself
                seen.append((self.fetch_preds.preds, self.learn.model(X).detach().softmax(1)))

    classifier(cbs=[fetch, Look()]).fit(2)
    for (preds, targets, decoded), expected in seen:
        torch.testing.assert_close(preds, expected)
        assert torch.equal(targets, Y) and torch.equal(decoded, expected.argmax(1))
    assert len(seen) == 2


def test_of_several_validation_sets_only_the_first_is_followed_by_fetching():
    fetch = FetchPredsCallback()
    learn = classifier(cbs=fetch)
    learn.dls = DataLoaders(learn.dls.train, learn.dls.valid, {"more": learn.dls.valid.new()}, device="cpu")
    heard = Heard()
    learn.fit(1, cbs=heard)
    assert heard.events.count("before_validate") == 3


def test_callbacks_that_ask_for_it_are_away_while_predictions_are_fetched():
    class Away(Heard):
        remove_on_fetch = True

    away, named, stays = Away(), Heard(), Heard()
    named.order = stays.order = 0
    classifier(cbs=[FetchPredsCallback(cbs=named), away, named, stays]).fit(1)
    assert [h.events.count("before_validate") for h in (away, named, stays)] == [1, 1, 2]
    assert [h.events.count("after_validate") for h in (away, named, stays)] == [1, 1, 2]


def test_fetching_does_not_change_the_training_or_its_record():
    def record(*cbs):
        learn = toy_learner(cbs=cbs, metrics=F.l1_loss)
        learn.fit(2)
        return [list(row) for row in learn.recorder.values]

    assert record() == record(FetchPredsCallback())


@pytest.mark.parametrize("make", [GatherPredsCallback, FetchPredsCallback])
def test_they_keep_every_promise_of_a_callback(make):
    check_callback(make)


# Test time augmentation


class Growing:
    """An augmentation that is known: 2 x + 1 in the first pass of three batches, 3 x + 1 in the second."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        factor = 2 + self.calls // 3
        self.calls += 1
        return x * factor + 1


def of_fastai(*cbs, **kwargs):
    """A learner whose predictions fastai 2.8.12 gave, with the same augmentation in an `after_batch` transform."""
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(12).view(3, 4) / 10)
        model.bias.zero_()
    x, y = torch.linspace(-1, 1, 40).view(10, 4), torch.arange(10) % 3
    dls = DataLoaders(*(TensorLoader(x, y, bs=4) for _ in range(2)), device="cpu")
    return Learner(dls, model, CrossEntropyLossFlat(), cbs=cbs, default_cbs=False, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [0.8312317728996277, 0.13848577439785004, 0.03028245083987713]),
        ({"beta": 0.6}, [0.807770848274231, 0.1570766717195511, 0.03515247628092766]),
        ({"use_max": True}, [0.9412254691123962, 0.1949114203453064, 0.050334930419921875]),
    ],
)
def test_augmented_and_plain_predictions_are_put_together_as_fastai_does(kwargs, expected):
    preds, targets = of_fastai(BatchTransform(Growing())).tta(n=2, **kwargs)
    assert preds[0].tolist() == pytest.approx(expected, abs=1e-6)  # fastai's
    assert preds.shape == (10, 3)
    assert targets.tolist() == [i % 3 for i in range(10)]


def test_without_beta_both_are_there_as_in_fastai():
    (augmented, plain), _ = of_fastai(BatchTransform(Growing())).tta(n=2, beta=None)
    assert augmented[0].tolist() == pytest.approx([0.847989559173584, 0.12520655989646912, 0.0268038623], abs=1e-6)
    assert plain[0].tolist() == pytest.approx([0.780958354473114, 0.1783234179019928, 0.0407182164], abs=1e-6)


def test_functions_that_are_given_take_the_place_of_those_of_the_training():
    preds, _ = of_fastai(BatchTransform(lambda x: x * 0)).tta(n=2, batch_tfms=Growing(), beta=0)
    assert preds[0].tolist() == pytest.approx([0.847989559173584, 0.12520655989646912, 0.0268038623], abs=1e-6)


def test_functions_of_one_sample_run_before_those_of_a_batch():
    shapes = []

    def each(x):
        shapes.append(tuple(x.shape))
        return x * 2

    given, _ = of_fastai().tta(n=1, item_tfms=each, batch_tfms=[lambda x: x + 1], beta=0)
    same, _ = of_fastai().tta(n=1, batch_tfms=lambda x: x * 2 + 1, beta=0)
    assert shapes == [(4,)] * 10
    assert given.tolist() == same.tolist()


def test_what_validation_needs_runs_in_every_pass():
    always = BatchTransform(lambda x: x * 2, valid=True)
    preds, _ = of_fastai(always, BatchTransform(lambda x: x + 1)).tta(n=1, beta=0)
    same, _ = of_fastai().tta(n=1, batch_tfms=lambda x: x * 2 + 1, beta=0)
    assert preds.tolist() == same.tolist()
    plain, _ = of_fastai(always, BatchTransform(lambda x: x + 1)).tta(n=1, beta=1)
    assert plain.tolist() == of_fastai(always).get_preds()[0].tolist()


def with_noise():
    return of_fastai(BatchTransform(lambda x: x + torch.rand_like(x)))


def test_every_pass_draws_numbers_of_its_own():
    learn = with_noise()
    torch.manual_seed(0)
    one, several = (learn.tta(n=n, beta=0)[0] for n in (1, 4))
    assert not torch.allclose(one, several, atol=1e-4)


def test_the_randomness_of_a_training_is_left_alone_so_two_calls_give_the_same():
    learn = with_noise()
    before = torch.get_rng_state()
    first, second = learn.tta()[0], learn.tta()[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)


def test_afterwards_the_training_alone_augments_again():
    learn = of_fastai(BatchTransform(Growing()))
    learn.tta()
    assert not learn.batch_transform.run_valid
    assert [type(cb) for cb in learn.cbs] == [BatchTransform]
    assert torch.equal(learn.get_preds()[0], of_fastai().get_preds()[0])


def test_an_error_in_a_pass_leaves_the_learner_as_it_was():
    learn = of_fastai(BatchTransform(raising(RuntimeError("no"))))
    with pytest.raises(RuntimeError, match="no"):
        learn.tta()
    assert not learn.batch_transform.run_valid
    assert torch.equal(learn.get_preds()[0], of_fastai().get_preds()[0])


def test_the_training_set_is_read_in_its_order_in_every_pass():
    learn = classifier(cbs=BatchTransform(lambda x: x))
    preds, targets = learn.tta(ds_idx=0, n=2)
    plain, _ = learn.get_preds(ds_idx=0)
    assert preds.tolist() == pytest.approx(plain, abs=1e-6)
    assert targets.tolist() == Y.tolist()


def test_another_loader_and_a_list_of_batches_do_too():
    learn = of_fastai(BatchTransform(Growing()))
    (_, plain), targets = learn.tta(dl=[(X[:4], Y[:4]), (X[4:7], Y[4:7])], beta=None)
    assert torch.equal(plain, learn.get_preds(dl=[(X[:7], Y[:7])])[0])
    assert targets.tolist() == Y[:7].tolist()


@pytest.mark.parametrize("use_max", [False, True])
def test_outputs_of_any_structure_are_put_together_place_by_place(use_max):
    class Two(nn.Module):
        def forward(self, x):
            return {"sum": x.sum(1), "both": (x, -x)}

    x = torch.arange(8.0).view(4, 2)
    learn = Learner(DataLoaders([(x,)], [(x,)]), Two(), None, default_cbs=False)
    preds, targets = learn.tta(n=1, batch_tfms=lambda x: x + 1, beta=0.5, use_max=use_max)
    more = 1 if use_max else 0.5
    assert targets is None
    assert torch.equal(preds["sum"], x.sum(1) + 2 * more)
    assert torch.equal(preds["both"][0], x + more)
    assert torch.equal(preds["both"][1], -x - (0 if use_max else 0.5))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, r"`tta` has nothing to augment with: pass functions of a batch, `batch_tfms=transforms.flip`"),
        ({"n": 0, "batch_tfms": torch.neg}, ValueError, r"`n=0`: pass a number of augmented passes, 1 or more"),
        ({"dl": iter([]), "batch_tfms": torch.neg}, TypeError, r"reads its loader several times, and `dl` is an iter"),
        ({"batch_tfms": 3}, TypeError, r"`3` is no function; pass functions of a batch"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        of_fastai().tta(**kwargs)
