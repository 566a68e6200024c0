"""Tensors made from numbers, arrays from tensors, one batch from many; expected values as fastai 2.8.12 gives them."""

import warnings
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fastcore.foundation import L

from learnloop.data.tensors import tensor, to_concat, to_np, unsqueeze

Pair = namedtuple("Pair", "image label")
NO_NUMBERS = "holds no numbers; pass numbers, or a list or array"


def same(made, values, dtype):
    """Whether a tensor has these values, as nested lists, and this dtype."""
    return (made.tolist(), made.dtype) == (values, dtype)


# tensor


@pytest.mark.parametrize(
    ("args", "values", "dtype"),
    [
        ((1, 2, 3), [1, 2, 3], torch.int64),
        (([1, 2], [3, 4]), [[1, 2], [3, 4]], torch.int64),
        ((1.5,), 1.5, torch.float32),
        ((True,), True, torch.bool),
        (([1, 2.0],), [1.0, 2.0], torch.float32),
        (([],), [], torch.float32),
        ((range(3),), [0, 1, 2], torch.int64),
        ((L(1, 2, 3),), [1, 2, 3], torch.int64),
        ((L(torch.tensor(1.0), torch.tensor(2.0)),), [1.0, 2.0], torch.float32),
        ((torch.tensor(1), torch.tensor(2)), [1, 2], torch.int64),
        ((np.float64(3),), 3.0, torch.float32),
        ((np.bool_(True),), True, torch.bool),
        ((np.array([1.0, 2.0]),), [1.0, 2.0], torch.float32),
        ((np.array([1.0, 2.0], dtype="float16"),), [1.0, 2.0], torch.float16),
        ((np.array([1, 2], dtype="int32"),), [1, 2], torch.int32),
        ((np.array([1, 65535], dtype="uint16"),), [1.0, 65535.0], torch.float32),
        ((torch.tensor([1.0], dtype=torch.float64),), [1.0], torch.float32),
        ((1 + 2j,), 1 + 2j, torch.complex64),
    ],
)
def test_a_tensor_is_made_from_whatever_holds_numbers(args, values, dtype):
    assert same(tensor(*args), values, dtype)


def test_a_tensor_is_made_from_what_pandas_holds():
    pd = pytest.importorskip("pandas")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pandas 3 hands out arrays that may not be written to
        assert same(tensor(pd.Series([1.0, 2.0])), [1.0, 2.0], torch.float32)
        assert same(tensor(pd.DataFrame({"a": [1, 2], "b": [3, 4]})), [[1, 3], [2, 4]], torch.int64)


def test_a_tensor_comes_back_itself():
    x = torch.ones(2)
    assert tensor(x) is x


def test_an_array_shares_its_memory_where_it_can():
    array = np.array([1, 2])
    tensor(array)[0] = 7
    assert array.tolist() == [7, 2]


def test_an_array_that_torch_cannot_share_is_copied():
    array = np.array([1, 2, 3])
    assert tensor(array[::-1]).tolist() == [3, 2, 1]
    array.flags.writeable = False
    tensor(array)[0] = 7
    assert array.tolist() == [1, 2, 3]


def test_a_list_of_arrays_is_stacked_without_torchs_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(tensor([np.array([1.0, 2.0]), np.array([3.0, 4.0])]), [[1.0, 2.0], [3.0, 4.0]], torch.float32)


def test_a_dtype_that_is_asked_for_is_given():  # fastai makes float32 of float64 all the same
    assert same(tensor([0.1], dtype=torch.float64), [0.1], torch.float64)
    assert tensor(torch.tensor([1, 2]), dtype=torch.float16).dtype is torch.float16
    assert tensor(np.array([1.0]), dtype=torch.float64).dtype is torch.float64
    assert tensor(1, device="meta").device == torch.device("meta")


@pytest.mark.parametrize("x", [[1.0], np.array([1.0]), torch.tensor([1.0])], ids=["list", "array", "tensor"])
def test_a_tensor_that_requires_a_gradient_is_a_leaf(x):
    made = tensor(x, requires_grad=True)
    assert made.requires_grad and made.is_leaf


def test_a_tensor_keeps_its_graph():
    doubled = 2 * torch.ones(1, requires_grad=True)
    assert tensor(doubled, requires_grad=True) is doubled


@pytest.mark.parametrize(
    ("x", "kind"), [("a", "str"), (None, "NoneType"), ({1: 2}, "dict"), ((i for i in [1]), "generator")]
)
def test_what_holds_no_numbers_is_refused(x, kind):
    with pytest.raises(TypeError, match=f"`tensor` got a {kind} that {NO_NUMBERS}"):
        tensor(x)


def test_unsqueeze_adds_dimensions_at_the_end_or_elsewhere():
    x = torch.zeros(2, 3)
    assert unsqueeze(x).shape == (2, 3, 1)
    assert unsqueeze(x, n=2).shape == (2, 3, 1, 1)
    assert unsqueeze(x, dim=0, n=2).shape == (1, 1, 2, 3)


# to_np


def test_arrays_stand_in_place_of_tensors_and_all_else_stays():
    array = np.array([5])
    batch = {"x": torch.tensor([1, 2]), "y": (torch.tensor(3.0), [None, "text", array])}
    made = to_np(batch)
    assert made["x"].tolist() == [1, 2] and made["x"].dtype == np.int64
    assert made["y"][0].dtype == np.float32 and made["y"][0].shape == ()
    assert made["y"][1][2] is array and made["y"][1][:2] == [None, "text"]


def test_a_named_tuple_keeps_its_type():  # fastai: TypeError
    made = to_np(Pair(torch.tensor(1), torch.tensor(2)))
    assert type(made) is Pair and made.label == 2


def test_a_tensor_with_a_graph_becomes_an_array():
    assert to_np(torch.ones(2, requires_grad=True) * 2).tolist() == [2.0, 2.0]


def test_bfloat16_becomes_float32():  # fastai: TypeError, since numpy has no such type
    made = to_np(torch.tensor([1.0, 0.5], dtype=torch.bfloat16))
    assert (made.tolist(), made.dtype) == ([1.0, 0.5], np.float32)


# to_concat


@pytest.mark.parametrize("container", [list, tuple, L])
def test_tensors_are_concatenated(container):
    assert to_concat(container([torch.tensor([1, 2]), torch.tensor([3])])).tolist() == [1, 2, 3]


def test_tensors_are_concatenated_along_another_dimension():
    batches = [torch.tensor([[1, 2]]), torch.tensor([[3, 4]])]
    assert to_concat(batches, dim=1).tolist() == to_concat(batches, dim=-1).tolist() == [[1, 2, 3, 4]]


def test_tuples_lists_and_mappings_are_concatenated_by_place():
    one, two = torch.tensor([1]), torch.tensor([2])
    made = to_concat([{"a": (one, [two])}, {"a": (two, [two])}])
    assert type(made) is dict and type(made["a"]) is tuple and type(made["a"][1]) is list
    assert made["a"][0].tolist() == [1, 2] and made["a"][1][0].tolist() == [2, 2]


def test_named_tuples_and_dataclasses_are_concatenated_by_name():
    @dataclass
    class Boxes:
        corners: torch.Tensor
        names: list

    x = torch.tensor([1])
    pair = to_concat([Pair(x, x), Pair(x, x)])
    boxes = to_concat([Boxes(x, ["cat"]), Boxes(x, ["dog", "cow"])])
    assert type(pair) is Pair and pair.label.tolist() == [1, 1]
    assert boxes.corners.tolist() == [1, 1] and boxes.names == ["cat", "dog", "cow"]


def test_tensors_without_a_dimension_are_stacked():  # fastai: TypeError
    assert to_concat([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1.0, 2.0]


def test_shapes_that_do_not_fit_become_a_list_of_rows():
    made = to_concat([torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, 8]])])
    assert type(made) is L and [row.tolist() for row in made] == [[1, 2], [3, 4, 5], [6, 7, 8]]


def test_an_empty_vector_joins_any_shape():
    assert to_concat([torch.empty(0), torch.tensor([[3.0, 4.0]])]).tolist() == [[3.0, 4.0]]


def test_what_is_no_tensor_is_collected():
    assert to_concat([None, None]) == L(None, None)
    assert to_concat([["a", "b"], ["c"]]) == ["a", "b", "c"]
    assert to_concat([(torch.tensor([1]), 5), (torch.tensor([2]), 6)])[1] == L(5, 6)


def test_no_batches_and_batches_of_nothing_stay_empty():
    assert to_concat([]) == []
    assert to_concat([(), ()]) == ()


def test_a_wrong_dimension_is_torchs_error():
    with pytest.raises(IndexError, match="Dimension out of range"):
        to_concat([torch.ones(2)], dim=3)
