"""Batches of every shape: moved, split, described, and given to models."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from fastcore.foundation import L
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from learnloop.data.batches import (
    accepted_keywords,
    default_device,
    describe,
    detuplify,
    exact_device,
    find_bs,
    find_device,
    first_tensor,
    get_model,
    model_caller,
    on_device,
    pick_loss,
    pick_pred,
    split,
    to_cpu,
    to_detach,
    to_device,
    to_float,
    to_half,
    tuplify,
)

CPU, META = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", "image label")


class Encoding(UserDict):
    """Like Hugging Face's BatchEncoding: a UserDict with attributes of its own and a `to` that changes it in place."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data)
        self.encodings = encodings

    def to(self, device):
        self.data = {k: v.to(device) for k, v in self.data.items()}
        return self


@dataclass
class Example:
    image: Tensor
    labels: Tensor
    names: tuple = ()


@dataclass(frozen=True)
class Derived:
    x: Tensor
    mask: Tensor = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "mask", self.x > 0)


class TwoKeys(Mapping):
    """A mapping whose constructor takes no mapping."""

    def __init__(self, a, b):
        self._items = {"a": a, "b": b}

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return 2


class OwnBatch:
    """A user's class that only knows how to move."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return self if self.x.device == torch.device(device) else OwnBatch(self.x.to(device))


def rows(n=4):
    return torch.zeros(n, 2)


def every_kind():
    return {
        "tensor": rows(),
        "tuple": (rows(), rows()),
        "list": [rows(), (rows(), "name")],
        "L": L(rows(), rows()),
        "dict": {"a": rows(), "b": {"c": rows()}},
        "ordered": OrderedDict(a=rows()),
        "encoding": Encoding({"a": rows()}),
        "namedtuple": Pair(rows(), rows()),
        "dataclass": Example(rows(), rows()),
        "derived": Derived(rows()),
        "own": OwnBatch(rows()),
        "no tensors": ("a", 1, None),
    }


KINDS = list(every_kind())


# -- devices


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_there_already_stays_the_same_object(kind):
    batch = every_kind()[kind]
    assert to_device(batch, "cpu") is batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_batch_keeps_its_type_and_leaves_the_old_one_alone(kind):
    batch = every_kind()[kind]
    moved = to_device(batch, "meta")
    assert type(moved) is type(batch)
    if kind not in ("own", "no tensors"):
        assert find_device(moved) == META
        assert find_device(batch) == CPU


def test_what_is_no_tensor_is_not_copied_when_the_rest_moves():
    name = object()
    moved = to_device((rows(), [name]), "meta")
    assert moved[0].device == META
    assert moved[1][0] is name


def test_an_object_with_to_moves_itself():
    assert to_device((OwnBatch(rows()),), "meta")[0].x.device == META


def test_a_packed_sequence_keeps_its_batch_sizes_on_the_host():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = to_device(packed, "meta")
    assert (moved.data.device, moved.batch_sizes.device) == (META, CPU)


def test_a_mapping_keeps_its_own_attributes():
    moved = to_device(Encoding({"a": rows()}, encodings="fast"), "meta")
    assert moved.encodings == "fast"
    assert moved["a"].device == META


def test_a_mapping_that_is_made_from_a_dict_keeps_its_type():
    moved = to_device(MappingProxyType({"a": rows()}), "meta")
    assert type(moved) is MappingProxyType
    assert moved["a"].device == META


def test_a_mapping_that_cannot_be_made_from_a_dict_becomes_one():
    moved = to_device(TwoKeys(rows(), OrderedDict(c=rows())), "meta")
    assert type(moved) is dict
    assert type(moved["b"]) is OrderedDict


def test_a_dataclass_moves_also_the_fields_that_its_constructor_does_not_take():
    moved = to_device(Derived(rows()), "meta")
    assert (moved.x.device, moved.mask.device) == (META, META)


def test_to_cpu_moves_to_the_host():
    batch = (rows(),)
    assert to_cpu(batch) is batch


def test_to_device_without_a_device_uses_the_default_one():
    assert find_device(to_device(rows())) == default_device()


@pytest.fixture
def accelerator(monkeypatch):
    """The device `meta` in the place of an accelerator; what a test tells `default_device` is forgotten after it."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: META)
    yield META
    default_device(None)


def test_the_default_device_is_the_accelerator_until_it_is_told_to_be_the_cpu(accelerator):
    assert default_device() == default_device(use=-1) == accelerator
    assert default_device(False) == CPU
    assert default_device() == default_device(-1) == find_device(to_device(rows())) == CPU
    assert default_device(True) == default_device() == accelerator
    default_device(False)
    assert default_device(None) == default_device() == accelerator


def test_the_default_device_is_no_accelerator_where_there_is_none(accelerator, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert default_device() == default_device(None) == CPU
    with pytest.raises(RuntimeError, match=r"`default_device\(use=True\)`: torch sees no accelerator here"):
        default_device(True)


def test_the_default_device_is_not_told_by_name():
    with pytest.raises(ValueError, match=r"`default_device\(use='cuda'\)`: pass True, False, None or -1"):
        default_device("cuda")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own"])
def test_on_device_knows_where_a_batch_is(kind):
    batch = every_kind()[kind]
    assert on_device(batch, CPU)
    assert on_device(batch, "meta") is (kind == "no tensors")


def test_on_device_is_false_if_a_single_tensor_is_elsewhere():
    assert not on_device((rows(), {"a": [rows().to("meta")]}), CPU)


def test_an_object_that_only_knows_how_to_move_counts_as_elsewhere():
    assert not on_device((OwnBatch(rows()),), CPU)


def test_on_device_takes_cpu_with_an_index_for_the_cpu():
    assert on_device((rows(), rows()), "cpu:0")


def test_an_exact_device_is_the_one_that_tensors_name():
    assert exact_device("cpu:0") == CPU
    assert exact_device("cuda:1") == torch.device("cuda", 1)
    assert exact_device("mps") == torch.device("mps", 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_without_an_index_is_the_current_one():
    batch = to_device((rows(),), "cuda")
    assert on_device(batch, "cuda")
    assert exact_device("cuda") == batch[0].device


def test_find_device_is_none_without_tensors():
    assert find_device(("a", [1])) is None


# -- contents


def test_detached_tensors_carry_no_graph_and_the_others_stay():
    x, plain = torch.ones(2, requires_grad=True) * 2, rows()
    a, nested = to_detach((x, {"plain": plain}))
    assert not a.requires_grad
    assert nested["plain"] is plain


def test_to_detach_leaves_tensors_where_they_are_if_asked():
    assert find_device(to_detach([rows().to("meta")], cpu=False)) == META


def test_to_float_and_to_half_change_floating_point_tensors_only():
    batch = {"x": torch.ones(2, dtype=torch.float64), "y": torch.ones(2, dtype=torch.int64)}
    assert [t.dtype for t in to_float(batch).values()] == [torch.float32, torch.int64]
    assert [t.dtype for t in to_half(batch).values()] == [torch.float16, torch.int64]


def test_first_tensor_is_the_first_in_nested_order():
    x = rows()
    assert first_tensor(("name", {"a": [1, x]}, rows())) is x
    assert first_tensor("name") is None


@pytest.mark.parametrize(
    ("batch", "bs"),
    [
        (rows(3), 3),
        ((rows(3), rows(5)), 3),
        ({"a": rows(3)}, 3),
        ([["a", "b"], rows(5)], 5),
        ((torch.tensor(1.0), rows(5)), 5),
        (Example(rows(3), rows(3)), 3),
        ((rows(3).numpy(),), 3),
        (["a", "b"], 2),
        ((), 0),
    ],
)
def test_the_batch_size_is_the_first_dimension_of_the_first_tensor_that_has_one(batch, bs):
    assert find_bs(batch) == bs


def test_describe_gives_types_shapes_and_devices():
    batch = (rows(), {"ids": torch.zeros(4, dtype=torch.int64), "name": "a"}, [torch.tensor(1.0)])
    assert describe(batch) == "(float32[4, 2] cpu, {ids: int64[4] cpu, name: str}, [float32[] cpu])"


def test_describe_counts_what_it_leaves_out():
    assert describe([1] * 10) == "[int, int, int, int, int, int, int, int, 2 more]"


# -- inputs and targets


@pytest.mark.parametrize(
    ("batch", "n_inp", "n_xb", "n_yb"),
    [((1, 2), None, 1, 1), ((1,), None, 1, 0), ((1, 2, 3), None, 2, 1), ((1, 2, 3), 1, 1, 2), ((), None, 0, 0)],
)
def test_the_first_n_inp_elements_of_a_tuple_are_inputs(batch, n_inp, n_xb, n_yb):
    assert split(batch, n_inp) == (batch[:n_xb], batch[n_xb : n_xb + n_yb])


def test_a_list_batch_becomes_tuples():
    assert split([1, 2, 3]) == ((1, 2), (3,))


def test_a_bare_tensor_is_one_input_without_target():
    x = rows()
    xb, yb = split(x)
    assert xb[0] is x
    assert yb == ()


def test_elements_stay_what_they_are():
    nested = {"a": [1]}
    assert split((nested, 2))[0][0] is nested


def test_the_usual_target_keys_of_a_mapping_are_found():
    batch = {"x": 1, "label": 2}
    xb, yb = split(batch)
    assert xb[0] is batch
    assert yb == (2,)


def test_a_mapping_without_a_usual_target_has_none():
    assert split({"x": 1})[1] == ()


def test_of_a_namedtuple_targets_names_what_is_no_input():
    Sample = namedtuple("Sample", "image label weight")
    batch = Sample(1, 2, 3)
    assert split(batch, targets="label") == ((1, 3), (2,))
    assert split(batch, n_inp=1, targets=("weight", "label")) == ((1,), (3, 2))
    assert split(batch) == ((1, 2), (3,))
    with pytest.raises(ValueError, match=r"`targets` names 'y', but the batch has 'image', 'label', 'weight'"):
        split(batch, targets="y")


def test_targets_names_the_keys_in_its_own_order():
    batch = {"x": 1, "a": 2, "b": 3, "labels": 4}
    assert split(batch, targets=("b", "a"))[1] == (3, 2)
    assert split(batch, targets="a")[1] == (2,)
    assert split(batch, targets=())[1] == ()


def test_a_missing_target_key_is_named_with_the_keys_there_are():
    with pytest.raises(ValueError, match=r"`targets` names 'y', but the batch has 'x', 'labels'"):
        split({"x": 1, "labels": 2}, targets=("y",))


def test_the_fields_of_a_dataclass_are_its_keys():
    batch = Example(rows(), rows())
    xb, yb = split(batch)
    assert xb[0] is batch
    assert yb[0] is batch.labels


def test_detuplify_and_tuplify_are_fastcores():
    assert detuplify((1,)) == 1
    assert tuplify([1, 2]) == (1, 2)


# -- the model


class Named(nn.Module):
    def forward(self, ids, mask=None):
        return ids, mask


class WithLabels(nn.Module):
    def forward(self, ids, labels=None):
        return labels


class Anything(nn.Module):
    def forward(self, **kwargs):
        return kwargs


class WholeBatch(nn.Module):
    def forward(self, batch):
        return batch


class WholeBatchAndMore(nn.Module):
    def forward(self, batch, **kwargs):
        return batch


def called(model, *xb):
    return model_caller(model, xb)(xb)


BATCH = {"ids": 1, "mask": 2, "labels": 3}


def test_a_tuple_goes_to_the_model_in_order():
    assert called(Named(), 1, 2) == (1, 2)


def test_a_mapping_goes_to_the_model_as_the_keywords_it_accepts():
    assert called(Named(), BATCH) == (1, 2)


def test_targets_go_to_a_model_that_names_them():
    assert called(WithLabels(), BATCH) == 3


def test_a_model_that_takes_any_keyword_gets_all():
    assert called(Anything(), Encoding(BATCH)) == BATCH


@pytest.mark.parametrize("model", [WholeBatch(), WholeBatchAndMore(), lambda *args: args[0], lambda b, /: b])
def test_a_model_that_knows_none_of_the_keys_gets_the_batch_itself(model):
    assert called(model, BATCH) is BATCH


def test_a_dataclass_goes_to_the_model_as_keywords_or_as_itself():
    example = Example(rows(), rows())
    assert called(lambda image: image, example) is example.image
    assert called(WholeBatch(), example) is example


def test_a_later_batch_may_lack_an_optional_key():
    call = model_caller(Named(), (BATCH,))
    assert call(({"ids": 5},)) == (5, None)


def test_a_tuple_that_replaces_a_mapping_goes_in_order():
    call = model_caller(Named(), (BATCH,))
    assert call((7, 8)) == (7, 8)


def test_a_required_argument_that_the_batch_lacks_is_named():
    with pytest.raises(TypeError, match=r"`Named.forward` needs `ids`, but the batch has 'input', 'mask'"):
        model_caller(Named(), ({"input": 1, "mask": 2},))


def test_two_unknown_arguments_are_both_named():
    with pytest.raises(TypeError, match="needs `a`, `b`, but"):
        model_caller(lambda a, b: a, (BATCH,))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Named(), {"ids", "mask"}),
        (nn.DataParallel(Named()), {"ids", "mask"}),
        (torch.compile(Named(), backend="eager"), {"ids", "mask"}),
        (partial(lambda a, b: a, 1), {"b"}),
        (lambda a, /, b, *c, d: a, {"b", "d"}),
    ],
)
def test_accepted_keywords_are_those_of_the_users_own_forward(model, names):
    assert accepted_keywords(model) == names


def test_the_users_own_model_is_found_inside_wrappers():
    model = Named()
    assert get_model(model) is get_model(nn.DataParallel(model)) is model
    assert get_model(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert get_model(len) is len


def test_accepted_keywords_is_none_for_a_model_that_takes_any():
    assert accepted_keywords(Anything()) is None


def test_a_prediction_is_the_logits_of_an_output_that_has_them():
    logits = rows()
    assert pick_pred({"logits": logits, "loss": None}) is logits
    assert pick_pred(SimpleNamespace(logits=logits)) is logits


@pytest.mark.parametrize("output", [rows(), (1, 2), {"hidden": 1}, None, torch.distributions.Bernoulli(logits=rows())])
def test_any_other_output_is_the_prediction_itself(output):
    assert pick_pred(output) is output


def test_the_loss_of_an_output_is_found_where_there_is_one():
    loss = torch.tensor(1.0)
    assert pick_loss({"loss": loss}) is loss
    assert pick_loss(SimpleNamespace(loss=loss)) is loss
    assert pick_loss(loss) is None
    assert pick_loss({"loss": None}) is None
    assert pick_loss((1, 2)) is None
