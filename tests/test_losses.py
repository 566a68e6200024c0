"""Losses: their numbers, the shapes they take, how predictions are read, and how a reduction is lifted.

Numbers marked as fastai's come from fastai 2.8.12, run on the same inputs.
"""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnloop.losses import (
    BaseLoss,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLoss,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
    NoneReduce,
    reduce_loss,
    unreduced,
)


def wave(*shape, step=1.3):
    return torch.sin(torch.arange(math.prod(shape)).float() * step).view(shape)


def numbered(*shape, c=3):
    return ((torch.arange(math.prod(shape)) * 2 + 1) % c).view(shape)


LOGITS, CLASSES, WEIGHT = wave(4, 3), numbered(4), torch.tensor([1.0, 2.0, 0.5])
SEGMENTS, MASK = wave(2, 3, 4, 5), numbered(2, 4, 5)
TARGETS = (wave(4, 3, step=0.7) > 0).long()
PROBABILITIES = LOGITS.sigmoid()

EVERY = [
    CrossEntropyLossFlat(weight=WEIGHT),
    FocalLoss(weight=WEIGHT),
    FocalLossFlat(),
    LabelSmoothingCrossEntropy(weight=WEIGHT),
    LabelSmoothingCrossEntropyFlat(),
    BCEWithLogitsLossFlat(),
    BCELossFlat(),
    MSELossFlat(),
    L1LossFlat(),
    BaseLoss(nn.CrossEntropyLoss),
    DiceLoss(),
]
each_loss = pytest.mark.parametrize("loss", EVERY, ids=lambda loss: type(loss).__name__)

# Mean, sum and the first two single values; fastai's
NUMBERS = {
    "cross entropy": (CrossEntropyLossFlat, {}, 1.404648, 5.618594, [0.703296, 1.456049]),
    "weighted cross entropy": (CrossEntropyLossFlat, {"weight": WEIGHT}, 1.140771, 6.27424, [1.406592, 1.456049]),
    "smoothed": (LabelSmoothingCrossEntropyFlat, {}, 1.390871, 5.563482, [0.75035, 1.432476]),
    "weighted smoothed": (
        LabelSmoothingCrossEntropy,
        {"eps": 0.2, "weight": WEIGHT},
        1.165991,
        6.032889,
        [1.360041, 1.408902],
    ),
    "focal": (FocalLossFlat, {}, 0.863401, 3.453604, [0.179393, 0.85623]),
    "weighted focal": (FocalLoss, {"gamma": 1.5, "weight": WEIGHT}, 1.116171, 4.464683, [0.922803, 0.97777]),
    "logits": (BCEWithLogitsLossFlat, {}, 0.760207, 9.122478, [0.693147, 0.323194]),
    "probabilities": (BCELossFlat, {}, 0.760207, 9.122478, [0.693147, 0.323194]),
    "squares": (MSELossFlat, {}, 0.991956, 11.903477, [0.0, 0.001328]),
    "distances": (L1LossFlat, {}, 0.733983, 8.807794, [0.0, 0.036442]),
    "dice": (DiceLoss, {}, 0.683971, 4.103827, [0.661174, 0.668228]),
    "squared dice": (DiceLoss, {"square_in_union": True, "smooth": 1.0}, 0.494058, 2.96435, [0.479336, 0.461326]),
}


def sample(loss_cls):
    if loss_cls is DiceLoss:
        return SEGMENTS, MASK
    if loss_cls is BCELossFlat:
        return PROBABILITIES, TARGETS
    return LOGITS, TARGETS if loss_cls in (BCEWithLogitsLossFlat, MSELossFlat, L1LossFlat) else CLASSES


# Numbers


@pytest.mark.parametrize("case", NUMBERS)
def test_mean_sum_and_single_values_are_those_of_fastai(case):
    loss_cls, kwargs, mean, total, first = NUMBERS[case]
    batch = sample(loss_cls)
    assert loss_cls(reduction="mean", **kwargs)(*batch).item() == pytest.approx(mean, abs=1e-5)
    assert loss_cls(reduction="sum", **kwargs)(*batch).item() == pytest.approx(total, abs=1e-5)
    assert loss_cls(reduction="none", **kwargs)(*batch).flatten()[:2].tolist() == pytest.approx(first, abs=1e-5)


def test_the_classes_of_an_image_lie_along_axis_1():
    # fastai's
    assert CrossEntropyLossFlat(axis=1)(SEGMENTS, MASK).item() == pytest.approx(1.256145, abs=1e-5)
    assert FocalLossFlat(axis=1)(SEGMENTS, MASK).item() == pytest.approx(0.698163, abs=1e-5)
    assert LabelSmoothingCrossEntropyFlat(axis=1)(SEGMENTS, MASK).item() == pytest.approx(1.250627, abs=1e-5)


def test_positive_weights_count_per_class():
    loss = BCEWithLogitsLossFlat(pos_weight=WEIGHT)
    assert loss(LOGITS, TARGETS).item() == pytest.approx(0.89896, abs=1e-5)  # fastai's


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 4, 5)])
def test_cross_entropy_with_classes_along_axis_1_is_torchs_in_any_number_of_dimensions(shape):
    torch.manual_seed(0)
    pred, targ = torch.randn(shape), torch.randint(3, (shape[0], *shape[2:]))
    expected = F.cross_entropy(pred, targ, reduction="none")
    torch.testing.assert_close(CrossEntropyLossFlat(axis=1, reduction="none")(pred, targ), expected.flatten())


def test_classes_in_the_middle_are_found_from_the_end_too():
    pred, targ = wave(2, 5, 3, 4), numbered(2, 5, 4)
    expected = F.cross_entropy(pred.movedim(2, 1), targ)
    torch.testing.assert_close(CrossEntropyLossFlat(axis=2)(pred, targ), expected)
    torch.testing.assert_close(CrossEntropyLossFlat(axis=-2)(pred, targ), expected)


def test_smoothing_without_weights_is_that_of_torch():
    expected = F.cross_entropy(LOGITS, CLASSES, label_smoothing=0.3)
    torch.testing.assert_close(LabelSmoothingCrossEntropy(0.3)(LOGITS, CLASSES), expected)


def test_focal_loss_with_gamma_0_is_cross_entropy():
    torch.testing.assert_close(FocalLoss(gamma=0.0)(LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES))


def test_focal_loss_has_a_gradient_where_the_model_is_certain():
    logits = torch.tensor([[200.0, 0.0], [0.0, 1.0]], requires_grad=True)
    FocalLoss(gamma=0.5)(logits, torch.tensor([0, 0])).backward()
    assert logits.grad.isfinite().all()


def test_dice_loss_is_0_for_a_perfect_and_1_for_a_wrong_segmentation():
    certain = 100.0 * F.one_hot(MASK, 3).movedim(-1, 1)
    right, wrong = DiceLoss(reduction="none")(certain, MASK), DiceLoss(reduction="none")(certain, (MASK + 1) % 3)
    torch.testing.assert_close(right, torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(wrong, torch.ones(2, 3), atol=1e-5, rtol=0)


def test_dice_loss_finds_the_classes_along_any_axis():
    torch.testing.assert_close(DiceLoss(axis=-1)(SEGMENTS.movedim(1, -1), MASK), DiceLoss()(SEGMENTS, MASK))


def test_dice_loss_gives_a_number_that_is_no_class_to_none():
    pred = wave(1, 2, 2, 2)
    unlabelled = DiceLoss(reduction="none", smooth=0.0)(pred, torch.full((1, 2, 2), 255))
    assert unlabelled.tolist() == [[1.0, 1.0]]


# Shapes and types


def test_sequences_are_flattened_to_one_prediction_per_target():
    pred, targ = wave(2, 5, 3), numbered(2, 5)
    torch.testing.assert_close(CrossEntropyLossFlat()(pred, targ), F.cross_entropy(pred.view(10, 3), targ.view(10)))


@pytest.mark.parametrize("loss_cls", [MSELossFlat, L1LossFlat, BCEWithLogitsLossFlat])
def test_a_column_of_predictions_fits_a_vector_of_targets(loss_cls):
    pred, targ = wave(4, 1), torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(loss_cls()(pred, targ), loss_cls()(pred.view(4), targ))


@pytest.mark.parametrize(
    "loss",
    [CrossEntropyLossFlat(axis=1), LabelSmoothingCrossEntropyFlat(axis=1), FocalLossFlat(axis=1)],
    ids=["cross entropy", "smoothed", "focal"],
)
def test_targets_can_be_probabilities_of_the_classes(loss):
    certain = F.one_hot(MASK, 3).movedim(-1, 1).float()
    torch.testing.assert_close(loss(SEGMENTS, certain), loss(SEGMENTS, MASK))


def test_unflattened_class_losses_follow_torchs_convention():
    loss = CrossEntropyLossFlat(axis=1, flatten=False, reduction="none")
    assert loss(SEGMENTS, MASK).shape == (2, 4, 5)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_per_class_meet_the_classes_along_axis(name):
    targ = (SEGMENTS > 0.3).float()
    loss = BCEWithLogitsLossFlat(axis=1, **{name: WEIGHT})
    expected = F.binary_cross_entropy_with_logits(SEGMENTS, targ, **{name: WEIGHT.view(3, 1, 1)})
    torch.testing.assert_close(loss(SEGMENTS, targ), expected)


def test_a_single_positive_weight_leaves_the_flattening_on():
    loss = BCEWithLogitsLossFlat(pos_weight=torch.tensor([2.0]))
    assert loss(torch.zeros(2, 1), torch.tensor([0, 1])).item() == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_class_numbers_may_be_of_any_integer_type(dtype):
    torch.testing.assert_close(CrossEntropyLossFlat()(LOGITS, CLASSES.to(dtype)), F.cross_entropy(LOGITS, CLASSES))


@pytest.mark.parametrize(
    ("pred_dtype", "targ_dtype", "loss_dtype"),
    [
        (torch.float32, torch.int64, torch.float32),
        (torch.float32, torch.bool, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.int64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_targets_take_the_precision_of_the_predictions(pred_dtype, targ_dtype, loss_dtype):
    assert BCELossFlat()(PROBABILITIES.to(pred_dtype), TARGETS.to(targ_dtype)).dtype == loss_dtype


def test_large_targets_do_not_overflow_beside_half_precision_predictions():
    loss = MSELossFlat()(torch.zeros(2, dtype=torch.float16), torch.tensor([1e6, 1e6]))
    assert loss.item() == pytest.approx(1e12)


def test_a_loss_from_elsewhere_is_called_on_what_was_flattened():
    class Shapes(nn.Module):
        def forward(self, inp, targ, scale=1):
            return torch.tensor([*inp.shape, *targ.shape]) * scale

    assert BaseLoss(Shapes, axis=1)(SEGMENTS, MASK).tolist() == [40, 3, 40]
    assert BaseLoss(Shapes, is_2d=False)(SEGMENTS, SEGMENTS, scale=2).tolist() == [240, 240]
    assert BaseLoss(Shapes, flatten=False)(LOGITS, CLASSES).tolist() == [4, 3, 4]


# How predictions are read


@pytest.mark.parametrize(
    ("loss", "axis"),
    [
        (CrossEntropyLossFlat(axis=1), 1),
        (FocalLossFlat(axis=1), 1),
        (LabelSmoothingCrossEntropyFlat(axis=1), 1),
        (LabelSmoothingCrossEntropy(), 1),
        (DiceLoss(axis=2), 2),
        (CrossEntropyLossFlat(), -1),
    ],
)
def test_class_losses_give_probabilities_and_decode_the_likeliest_class(loss, axis):
    probabilities = loss.activation(SEGMENTS)
    torch.testing.assert_close(probabilities, SEGMENTS.softmax(dim=axis))
    assert torch.equal(loss.decodes(probabilities), SEGMENTS.argmax(dim=axis))


def test_logits_become_probabilities_and_those_above_the_threshold_true():
    loss = BCEWithLogitsLossFlat(thresh=0.7)
    probabilities = loss.activation(torch.tensor([-1.0, 0.5, 2.0]))
    assert probabilities.tolist() == pytest.approx([0.268941, 0.622459, 0.880797], abs=1e-6)
    assert loss.decodes(probabilities).tolist() == [False, False, True]


@pytest.mark.parametrize("loss", [MSELossFlat(), L1LossFlat(), BCELossFlat(), BaseLoss(nn.MSELoss)])
def test_other_losses_leave_the_output_as_it_is(loss):
    assert loss.activation(LOGITS) is LOGITS
    assert loss.decodes(LOGITS) is LOGITS


def test_losses_over_class_numbers_say_so():
    named = [loss for loss in EVERY if getattr(loss, "y_int", False)]
    assert [type(loss).__name__ for loss in named] == [
        "CrossEntropyLossFlat",
        "FocalLoss",
        "FocalLossFlat",
        "LabelSmoothingCrossEntropy",
        "LabelSmoothingCrossEntropyFlat",
    ]


# As modules


@each_loss
def test_every_loss_survives_pickling_and_copying(loss):
    loss = copy.deepcopy(loss)
    loss.reduction = "sum"
    pred, targ = sample(type(loss))
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert other.reduction == "sum"
        torch.testing.assert_close(other(pred, targ), loss(pred, targ))


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropyLossFlat(weight=WEIGHT),
        FocalLossFlat(weight=WEIGHT),
        LabelSmoothingCrossEntropyFlat(weight=WEIGHT),
        BCEWithLogitsLossFlat(pos_weight=WEIGHT),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_weights_move_with_the_loss(loss):
    moved = copy.deepcopy(loss).to("meta")
    assert [buffer.device.type for buffer in moved.buffers()] == ["meta"]


def test_a_loss_shows_what_it_computes():
    assert repr(CrossEntropyLossFlat(axis=1)) == "CrossEntropyLossFlat(CrossEntropyLoss(), axis=1)"
    assert repr(FocalLossFlat()) == "FocalLossFlat(FocalLoss(gamma=2.0, reduction='mean'), axis=-1)"
    assert repr(DiceLoss()) == "DiceLoss(axis=1, reduction='sum')"


# Reductions


@each_loss
def test_the_reduction_can_be_changed_later(loss):
    loss, batch = copy.deepcopy(loss), sample(type(loss))
    loss.reduction = "sum"
    total = loss(*batch)
    loss.reduction = "none"
    torch.testing.assert_close(loss(*batch).sum(), total)


def test_reduce_loss_takes_the_mean_or_the_sum_or_nothing():
    loss = torch.tensor([1.0, 2.0, 6.0])
    assert reduce_loss(loss).item() == 3.0
    assert reduce_loss(loss, "sum").item() == 9.0
    assert reduce_loss(loss, "none") is loss


@pytest.mark.parametrize("loss", [CrossEntropyLossFlat(reduction="sum"), nn.CrossEntropyLoss(reduction="sum")])
def test_unreduced_changes_the_reduction_and_puts_it_back(loss):
    with unreduced(loss) as single:
        assert single is loss
        assert single(LOGITS, CLASSES).shape == (4,)
    assert loss.reduction == "sum"


def test_unreduced_puts_the_reduction_back_after_an_error():
    loss = MSELossFlat()
    with pytest.raises(KeyError), unreduced(loss):
        raise KeyError
    assert loss.reduction == "mean"


@pytest.mark.parametrize("loss", [F.cross_entropy, partial(F.cross_entropy, reduction="sum")])
def test_unreduced_gives_a_partial_of_a_function(loss):
    with unreduced(loss) as single:
        assert single(LOGITS, CLASSES).shape == (4,)


def test_unreduced_reaches_the_argument_of_a_loss_inside_a_flattened_one():
    class Squares(nn.Module):
        def forward(self, inp, targ, reduction="mean"):
            return reduce_loss((inp - targ) ** 2, reduction)

    loss = BaseLoss(Squares, is_2d=False)
    assert not hasattr(loss, "reduction")
    with unreduced(loss) as single:
        assert single(LOGITS, TARGETS).shape == (12,)


def test_unreduced_hands_the_partial_over_and_then_the_function_itself():
    handed = []
    with unreduced(F.mse_loss, handed.append) as single:
        assert handed == [single]
    assert handed == [single, F.mse_loss]


def test_a_changed_reduction_needs_no_replacement():
    handed = []
    with unreduced(MSELossFlat(), handed.append):
        pass
    assert handed == []


def test_none_reduce_lifts_the_reduction_as_in_fastai():
    loss = CrossEntropyLossFlat()
    with NoneReduce(loss) as single:
        assert single(LOGITS, CLASSES).shape == (4,)
    assert loss.reduction == "mean"


# Wrong arguments


@pytest.mark.parametrize(
    "loss_cls",
    [
        *(CrossEntropyLossFlat, FocalLoss, FocalLossFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat),
        *(BCEWithLogitsLossFlat, BCELossFlat, MSELossFlat, L1LossFlat, DiceLoss, partial(BaseLoss, nn.NLLLoss)),
    ],
)
def test_an_unknown_reduction_is_refused_when_it_is_written(loss_cls):
    with pytest.raises(ValueError, match=r"`reduction` is 'avg'; it is one of 'mean', 'sum', 'none'\."):
        loss_cls(reduction="avg")
    loss = loss_cls()
    former = loss.reduction
    with pytest.raises(ValueError, match="`reduction` is 'avg'"):
        loss.reduction = "avg"
    assert loss.reduction == former


def test_reduce_loss_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="`reduction` is 'max'; it is one of 'mean', 'sum', 'none'"):
        reduce_loss(torch.ones(2), "max")


def test_a_loss_from_elsewhere_may_have_reductions_of_its_own():
    class Largest(nn.Module):
        reduction = "max"

        def forward(self, inp, targ):
            return (inp - targ).abs().max()

    assert BaseLoss(Largest, is_2d=False).reduction == "max"
    assert BaseLoss(nn.KLDivLoss, reduction="batchmean").reduction == "batchmean"


@pytest.mark.parametrize("eps", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("loss_cls", [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_a_smoothing_outside_0_to_1_is_refused(loss_cls, eps):
    with pytest.raises(ValueError, match=f"`eps` is {eps}, but it is a share of the target, from 0 to 1"):
        loss_cls(eps=eps)


def test_a_negative_gamma_is_refused():
    with pytest.raises(ValueError, match="`gamma` is -1; it is 0 or more"):
        FocalLossFlat(gamma=-1)


def test_flattening_and_weights_per_class_exclude_each_other():
    with pytest.raises(ValueError, match="`pos_weight` holds a number per class, and `flatten` loses the classes"):
        BCEWithLogitsLossFlat(pos_weight=WEIGHT, flatten=True)


def test_targets_that_do_not_fit_the_predictions_are_refused_with_both_shapes():
    message = (
        r"the predictions have shape \(2, 3, 4, 5\), that is 5 classes along `axis=-1` for 24 targets, and the targets "
        r"have shape \(2, 4, 5\)\. .* set `axis` to the dimension of the classes"
    )
    with pytest.raises(ValueError, match=message):
        CrossEntropyLossFlat()(SEGMENTS, MASK)


def test_numbers_without_a_target_are_refused_with_both_shapes():
    message = r"the predictions have shape \(4, 3\) and the targets \(4,\): not as many numbers"
    with pytest.raises(ValueError, match=message):
        MSELossFlat()(LOGITS, CLASSES)


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`axis=2` is no dimension of the predictions, which have shape \(4, 3\)"):
        CrossEntropyLossFlat(axis=2)(LOGITS, CLASSES)


def test_predictions_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match="MSELossFlat takes tensors, and got tuple and Tensor as predictions"):
        MSELossFlat()((LOGITS, LOGITS), TARGETS)


def test_dice_loss_refuses_one_hot_targets():
    message = r"Pass class numbers, not one-hot, of shape \(2, 4, 5\)"
    with pytest.raises(ValueError, match=message):
        DiceLoss()(SEGMENTS, torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("axis", [0, 4])
def test_dice_loss_refuses_an_axis_that_holds_no_classes(axis):
    with pytest.raises(ValueError, match=f"DiceLoss takes predictions .* classes \\(`axis={axis}`\\) and places"):
        DiceLoss(axis=axis)(SEGMENTS, MASK)


def test_dice_loss_refuses_predictions_without_places():
    with pytest.raises(ValueError, match=r"DiceLoss takes predictions .* got shape \(4, 3\)"):
        DiceLoss()(LOGITS, CLASSES)


def test_a_function_without_a_reduction_cannot_be_unreduced():
    def own_loss(pred, targ):
        return (pred - targ).abs().mean()

    message = "`own_loss` has no `reduction`, so it cannot give one loss per target"
    with pytest.raises(TypeError, match=message), unreduced(own_loss):
        pass
