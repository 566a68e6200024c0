"""DataLoaders and TensorLoader: what they give, keep and refuse."""

import pickle
import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from learnloop import DataLoaders, TensorLoader
from learnloop.data.keyed import Key
from learnloop.data.loaders import due_after, is_due, known_n_inp, name_of, names_of

X = torch.arange(10.0)[:, None]
Y = torch.arange(10) % 2


def lists(dl):
    return [[x.flatten().tolist() for x in batch] for batch in dl]


def first_column(stream):
    return [batch[0].flatten().tolist() for batch in stream]


def dls(**kwargs):
    return DataLoaders(TensorLoader(X, Y, bs=4), TensorLoader(X, Y, bs=5), **{"device": "cpu", **kwargs})


# TensorLoader


def test_a_tensor_loader_yields_tuples_of_rows():
    assert lists(TensorLoader(torch.arange(5), torch.arange(5) * 10, bs=2)) == [
        [[0, 1], [0, 10]],
        [[2, 3], [20, 30]],
        [[4], [40]],
    ]


def test_a_batch_is_a_tuple_also_of_one_tensor():
    assert [type(batch) for batch in TensorLoader(X, bs=5)] == [tuple, tuple]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_last_batch_is_smaller_or_left_out(drop_last, sizes):
    loader = TensorLoader(X, bs=4, drop_last=drop_last)
    assert [len(x) for (x,) in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_may_be_changed_in_place_without_changing_the_data(shuffle):
    x = X.clone()
    for (xb,) in TensorLoader(x, bs=4, shuffle=shuffle):
        xb.fill_(-1.0)
    assert torch.equal(x, X)


def test_arrays_and_lists_become_tensors():
    assert lists(TensorLoader([1, 2], X.numpy()[:2])) == [[[1, 2], [0.0, 1.0]]]


def test_shuffling_yields_every_sample_once_in_an_order_of_its_own_each_time():
    loader = TensorLoader(X, bs=4, shuffle=True)
    passes = [first_column(loader) for _ in range(3)]
    assert [sorted(chain(*p)) for p in passes] == [X.flatten().tolist()] * 3
    assert len({str(p) for p in passes}) == 3


def test_shuffling_keeps_inputs_and_targets_together():
    for x, y in TensorLoader(X, X * 2, bs=4, shuffle=True):
        assert torch.equal(x * 2, y)


def test_a_seed_fixes_the_orders_pass_by_pass():
    def passes():
        loader = TensorLoader(X, bs=4, shuffle=True, seed=3)
        return [first_column(loader) for _ in range(2)]

    torch.manual_seed(0)
    first = passes()
    torch.manual_seed(1)
    assert passes() == first
    assert first[0] != first[1]


def test_without_shuffling_nothing_is_drawn():
    before = torch.get_rng_state()
    lists(TensorLoader(X, bs=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_keyed_pass_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    loader = TensorLoader(X, bs=4, shuffle=True)
    assert first_column(loader.keyed_batches(Key(1, 0))) == first_column(loader.keyed_batches(Key(1, 0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_keyed_pass_begins_at_any_batch(shuffle, start):
    loader = TensorLoader(X, bs=4, shuffle=shuffle)
    whole = first_column(loader.keyed_batches(Key(1, 0)))
    assert first_column(loader.keyed_batches(Key(1, 0), start)) == whole[start:]


def test_the_loaders_own_seed_wins_over_the_keys():
    loader = TensorLoader(X, bs=4, shuffle=True, seed=3)
    assert first_column(loader.keyed_batches(Key(1, 0))) == first_column(loader.keyed_batches(Key(2, 0)))
    assert first_column(loader.keyed_batches(Key(1, 0))) != first_column(loader.keyed_batches(Key(1, 1)))


def test_its_attributes_are_those_of_torchs_loader():
    loader = TensorLoader(X, Y, bs=4)
    assert (loader.bs, loader.batch_size, loader.n, len(loader.dataset)) == (4, 4, 10, 10)
    assert [t.tolist() for t in loader.dataset[3]] == [[3.0], 1]
    assert loader.device == torch.device("cpu")


def test_one_batch_is_the_first_and_moves_no_generator():
    before = torch.get_rng_state()
    assert [t.tolist() for t in TensorLoader(X, Y, bs=2).one_batch()] == [[[0.0], [1.0]], [0, 1]]
    TensorLoader(X, Y, bs=2, shuffle=True).one_batch()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_loader_is_like_the_old_one_but_for_what_is_said():
    loader = TensorLoader(X, Y, bs=4, shuffle=True, drop_last=True, seed=5, n_inp=2)
    other = loader.new(X[:3], bs=2)
    assert (other.n, other.bs, other.shuffle, other.drop_last, other.seed, other.n_inp) == (3, 2, True, True, 5, 2)
    assert loader.new().tensors[1] is loader.tensors[1]


def test_tensors_go_to_another_device():
    loader = TensorLoader(X, Y, bs=4, device="meta")
    assert {t.device.type for t in next(iter(loader))} == {"meta"}


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"TensorLoader\(\) got no tensor"),
        ((X, Y[:3]), {}, r"tensors of different length: \[10, 3\]"),
        ((X,), {"bs": 0}, "bs=0: a batch needs at least one sample"),
        ((X,), {"bs": 2.5}, "bs=2.5: a batch needs at least one sample"),
        ((torch.tensor(1.0), X), {}, r"tensors of different length: \[0, 10\]"),
    ],
)
def test_a_tensor_loader_refuses_what_it_cannot_batch(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(*args, **kwargs)


def test_a_tensor_loader_shows_what_it_holds():
    assert repr(TensorLoader(X, bs=4, shuffle=True)) == "TensorLoader(10 samples, bs=4, shuffle=True, cpu)"


# DataLoaders


def test_loaders_are_reached_by_name_and_by_number():
    train, valid, test = [[1]], [[2]], [[3]]
    both = DataLoaders(train, valid, test)
    assert both.train is train
    assert both.valid is valid
    assert [both[i] for i in range(3)] == [train, valid, test]
    assert list(both) == [train, valid, test]
    assert len(both) == 3


def test_a_loader_that_is_not_there_is_an_index_error():
    with pytest.raises(IndexError, match="there is no loader 1: DataLoaders got 1, numbered from 0"):
        DataLoaders([[1]]).valid  # noqa: B018


# Named validation sets


def named(*loaders, **kwargs):
    """A training and a validation loader, and what else is given."""
    return DataLoaders([[1]], [[2]], *loaders, **{"device": "cpu", **kwargs})


def test_a_mapping_names_further_loaders():
    noisy, old = [[3]], [[4]]
    several = named({"noisy": noisy, "old": old})
    assert several.names == ["train", "valid", "noisy", "old"]
    assert several.noisy is several["noisy"] is several[2] is noisy
    assert several.old is several["old"] is several[-1] is old
    assert (several["train"], several["valid"]) == ([[1]], [[2]])
    assert len(several) == 4


def test_a_named_loader_is_the_one_that_stands_at_its_number_now():
    several = named({"noisy": [[3]]})
    several.loaders[2] = [[4]]
    assert several.noisy == [[4]]


def test_names_are_among_the_attributes_that_are_listed():
    assert {"noisy", "valid", "loaders"} <= set(dir(named({"noisy": [[3]]})))


def test_a_further_loader_without_a_name_has_its_number():
    several = named([[3]], {"noisy": [[4]]}, [[5]])
    assert several.names == ["train", "valid", None, "noisy", None]
    assert (several[2], several.noisy, several[4]) == ([[3]], [[4]], [[5]])


def test_a_mapping_may_stand_in_the_place_of_valid():
    several = DataLoaders([[1]], {"clean": [[2]], "noisy": [[3]]})
    assert several.names == ["train", "clean", "noisy"]
    assert (several.valid, several.clean, several.noisy) == ([[2]], [[2]], [[3]])


def test_the_first_of_a_mapping_in_the_place_of_valid_may_be_called_valid():
    assert DataLoaders([[1]], {"valid": [[2]], "noisy": [[3]]}).names == ["train", "valid", "noisy"]


def test_a_mapping_without_entries_adds_nothing():
    assert DataLoaders([[1]], {}).names == ["train"]
    assert named({}).names == ["train", "valid"]


def test_named_loaders_go_to_another_device_with_the_others():
    several = DataLoaders(TensorLoader(X), {"noisy": TensorLoader(X)}, device="meta")
    assert several.noisy.device == torch.device("meta")


def test_named_loaders_are_there_in_a_copy():
    several = pickle.loads(pickle.dumps(named({"noisy": [[3]]}, every={"noisy": 2})))
    assert (several.noisy, several.every) == ([[3]], {"noisy": 2})


def test_a_name_that_is_not_there_is_an_error_with_the_nearest_spelling():
    several = named({"noisy": [[3]]})
    message = "there is no loader `nosy`; there is train, valid, noisy. Did you mean `noisy`?"
    with pytest.raises(KeyError, match=re.escape(message)):
        several["nosy"]
    with pytest.raises(AttributeError, match="'DataLoaders' object has no attribute 'nosy'"):
        several.nosy  # noqa: B018


def test_an_attribute_error_of_a_property_is_its_own():
    with pytest.raises(AttributeError, match="'list' object has no attribute 'dataset'"):
        named({"noisy": [[3]]}).train_ds  # noqa: B018


@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        ([{"train": [[1]]}], TypeError, "the first loader is a mapping, but that one trains"),
        ([[[1]], [[2]], {"train": [[3]]}], ValueError, "`train` cannot name this validation set: `dls.train` is some"),
        ([[[1]], [[2]], {"bs": [[3]]}], ValueError, "`bs` cannot name .* `dls.bs` is something else already. Rename"),
        ([[[1]], [[2]], {"path": [[3]]}], ValueError, "`path` cannot name this validation set"),
        ([[[1]], [[2]], {"one_batch": [[3]]}], ValueError, "`one_batch` cannot name this validation set"),
        ([[[1]], [[2]], {"valid": [[3]]}], ValueError, "`dls.valid` is the first loader after the training loader"),
        ([[[1]], {"a": [[2]], "valid": [[3]]}], ValueError, "`dls.valid` is the first loader after the training"),
        ([[[1]], {"a": [[2]]}, {"a": [[3]]}], ValueError, "`a` cannot name .* `dls.a` is something else already"),
        ([[[1]], {0: [[2]]}], TypeError, "0 is no name for a validation set; pass a string that is not empty"),
        ([[[1]], {"": [[2]]}], TypeError, "'' is no name for a validation set"),
        ([[[1]], {"a": 3}], TypeError, "loader 1 is a int, which cannot be iterated"),
    ],
)
def test_a_name_by_which_a_set_could_not_be_reached_is_refused(loaders, error, message):
    with pytest.raises(error, match=message):
        DataLoaders(*loaders)


# When they are validated


@pytest.mark.parametrize(
    ("n_epoch", "every", "epochs"),
    [(6, 1, [0, 1, 2, 3, 4, 5]), (6, 2, [1, 3, 5]), (5, 2, [1, 3, 4]), (4, 5, [3]), (7, 3, [2, 5, 6]), (0, 2, [])],
)
def test_what_is_done_every_n_epochs_is_done_after_the_last_one_too(n_epoch, every, epochs):
    assert [e for e in range(n_epoch) if is_due(e, n_epoch, every)] == epochs


def test_named_sets_come_after_valid_and_loaders_without_a_name_never():
    several = named([[3]], {"noisy": [[4]], "old": [[5]]}, every={"old": 2})
    assert [due_after(several, epoch, 3) for epoch in range(3)] == [[1, 3], [1, 3, 4], [1, 3, 4]]


def test_valid_has_a_cadence_too():
    several = named({"noisy": [[3]]}, every={"valid": 3})
    assert [due_after(several, epoch, 4) for epoch in range(4)] == [[2], [2], [1, 2], [1, 2]]


def test_without_a_validation_loader_nothing_is_due():
    assert due_after(DataLoaders([[1]]), 0, 1) == []


@pytest.mark.parametrize(
    ("every", "message"),
    [
        ({"nosy": 2}, "`every` names `nosy`, which is no validation set; there is valid, noisy. Did you mean `noisy`?"),
        ({"train": 2}, "`every` names `train`, which is no validation set; there is valid, noisy."),
        ({"noisy": 0}, "`every={'noisy': 0}`: pass a whole number of epochs, 1 or more."),
        ({"noisy": 1.5}, "`every={'noisy': 1.5}`: pass a whole number of epochs, 1 or more."),
        ({"noisy": True}, "`every={'noisy': True}`: pass a whole number of epochs, 1 or more."),
    ],
)
def test_a_wrong_cadence_is_refused(every, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        named({"noisy": [[3]]}, every=every)


class Foreign:
    """Loaders put together elsewhere: by number, with a length, and by name."""

    def __init__(self, *loaders):
        self.loaders = loaders

    def __getitem__(self, i):
        return self.loaders[i]

    def __len__(self):
        return len(self.loaders)

    train = property(lambda self: self[0])
    valid = property(lambda self: self[1])


@pytest.mark.parametrize(
    ("dls", "names", "due"),
    [
        (Foreign([[1]]), ["train"], []),
        (Foreign([[1]], [[2]]), ["train", "valid"], [1]),
        (Foreign([[1]], [[2]], [[3]]), ["train", "valid", None], [1]),
        (Foreign([[1]], None), ["train", None], []),
        (SimpleNamespace(train=[[1]], valid=[[2]]), ["train", "valid"], [1]),
        (SimpleNamespace(train=[[1]]), ["train", None], []),
    ],
)
def test_loaders_put_together_elsewhere_have_a_training_and_a_validation_set(dls, names, due):
    assert names_of(dls) == names
    assert due_after(dls, 0, 2) == due


def test_a_loader_by_any_number_has_its_name():
    several = named([[3]], {"noisy": [[4]]})
    assert [name_of(several, i) for i in (0, 1, 2, 3, -1, 4, -5, "noisy")] == [
        *("train", "valid", None, "noisy"),
        *("noisy", None, None, "noisy"),
    ]


# Datasets


def test_datasets_are_reached_too():
    both = DataLoaders(DataLoader(range(4), 2), DataLoader(range(3), 2))
    assert (both.train_ds, both.valid_ds) == (range(4), range(3))


def test_no_loader_is_an_error():
    with pytest.raises(ValueError, match=r"DataLoaders\(\) got no loader"):
        DataLoaders()


def test_what_cannot_be_iterated_is_an_error():
    with pytest.raises(TypeError, match="loader 1 is a int, which cannot be iterated"):
        DataLoaders([[1]], 3)


@pytest.mark.parametrize(
    ("train", "bs"),
    [(TensorLoader(X, bs=4), 4), (DataLoader(range(4), 2), 2), ([[1]], None), (DataLoader([1], None), None)],
)
def test_bs_is_that_of_the_training_loader_where_it_has_one(train, bs):
    assert DataLoaders(train).bs == bs


def test_the_path_is_a_path():
    assert DataLoaders([[1]]).path == Path(".")
    assert DataLoaders([[1]], path="models").path == Path("models")


# How many inputs


def test_n_inp_is_all_but_the_last_element_of_a_batch():
    assert DataLoaders(TensorLoader(X, X, Y), device="cpu").n_inp == 2
    assert DataLoaders(TensorLoader(X), device="cpu").n_inp == 1


def test_n_inp_is_as_given_or_as_the_loader_says():
    assert DataLoaders(TensorLoader(X, X, Y), n_inp=1).n_inp == 1
    assert DataLoaders(TensorLoader(X, X, Y, n_inp=3)).n_inp == 3


def test_n_inp_is_not_known_before_a_batch_was_read():
    both = dls()
    assert known_n_inp(both, both.train) is None


def test_asking_for_n_inp_moves_no_generator():
    before = torch.get_rng_state()
    assert DataLoaders(DataLoader(TensorDataset(X, Y), 4, shuffle=True), device="cpu").n_inp == 1
    assert torch.equal(torch.get_rng_state(), before)


# Devices


def test_the_device_is_the_one_that_was_said():
    assert dls().device == torch.device("cpu")
    assert dls(device="meta").device == torch.device("meta")


def test_to_moves_the_tensors_of_our_own_loaders_at_once():
    both = dls()
    assert both.to("meta") is both
    assert {loader.device.type for loader in both} == {"meta"}


def test_setting_the_device_is_the_same_as_to():
    both = dls()
    both.device = "meta"
    assert (both.device, both.train.device) == (torch.device("meta"), torch.device("meta"))


def test_cpu_goes_back_to_host_memory():
    both = DataLoaders([X], device="meta")
    assert both.cpu().device == torch.device("cpu")


def test_cuda_names_the_gpu():
    both = DataLoaders([[1]])
    assert both.cuda().device == torch.device("cuda")


# A batch, and loaders over other data


def test_one_batch_is_on_the_device():
    (x, y) = DataLoaders(DataLoader(TensorDataset(X, Y), 4), device="meta").one_batch()
    assert (x.device.type, y.device.type, x.shape) == ("meta", "meta", (4, 1))


@pytest.mark.parametrize("train", [TensorLoader(X, bs=4, shuffle=True), DataLoader(X, 4, shuffle=True), [X[:4]]])
def test_one_batch_moves_no_generator_and_is_the_same_each_time(train):
    before = torch.get_rng_state()
    both = DataLoaders(train, device="cpu")
    assert repr(both.one_batch()) == repr(both.one_batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_one_batch_of_a_loader_that_is_not_keyed_is_iterated_as_it_is():
    read = []

    class Loud(DataLoader):
        def __iter__(self):
            read.append("iter")
            return super().__iter__()

    DataLoaders(Loud(X, 4), keyed=False, device="cpu").one_batch()
    assert read == ["iter"]


def test_one_batch_of_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="the training loader is empty"):
        DataLoaders([]).one_batch()


def test_a_test_loader_over_tensors_is_like_the_validation_loader():
    test = dls().test_dl(X[:7])
    assert (type(test), test.bs, test.shuffle) == (TensorLoader, 5, False)
    assert first_column(test) == [[0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 6.0]]


def test_a_test_loader_may_have_targets_and_another_batch_size():
    assert lists(dls().test_dl((X[:3], Y[:3]), bs=2)) == [[[0.0, 1.0], [0, 1]], [[2.0], [0]]]


def test_a_test_loader_over_a_dataset_keeps_collate_and_batch_size_but_no_shuffling():
    def collate(samples):
        return torch.tensor(samples) * 10

    both = DataLoaders(DataLoader(range(6), 2), DataLoader(range(6), 3, shuffle=True, collate_fn=collate))
    assert [batch.tolist() for batch in both.test_dl([1, 2, 3, 4])] == [[10, 20, 30], [40]]


def test_without_a_validation_loader_a_test_loader_is_like_the_training_loader():
    assert DataLoaders(TensorLoader(X, bs=4, shuffle=True)).test_dl(X).bs == 4
    assert DataLoaders([[1]]).test_dl(range(100)).batch_size == 64


# From datasets


def test_from_dsets_makes_a_shuffled_loader_to_train_and_an_ordered_one_to_validate():
    both = DataLoaders.from_dsets(range(10), range(6), bs=4, device="cpu")
    assert (both.bs, both.valid.batch_size) == (4, 4)
    assert [batch.tolist() for batch in both.valid] == [[0, 1, 2, 3], [4, 5]]
    torch.manual_seed(0)
    assert [i for batch in both.train for i in batch.tolist()] != list(range(10))


def test_from_dsets_takes_what_torchs_loader_takes_and_what_dataloaders_takes():
    both = DataLoaders.from_dsets(
        range(10), range(6), bs=4, shuffle=False, drop_last=True, path="x", n_inp=1, targets="y", keyed=False
    )
    assert [batch.tolist() for batch in both.train] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(both.valid) == 2  # a validation that leaves samples out would be another number
    assert (both.path, both.n_inp, both.targets, both.keyed) == (Path("x"), 1, ("y",), False)


def test_from_dsets_without_a_validation_set_has_one_loader():
    assert len(DataLoaders.from_dsets(range(4))) == 1


def test_from_dsets_takes_several_validation_sets_by_name():
    several = DataLoaders.from_dsets(
        range(10), {"valid": range(6), "old": range(3)}, bs=4, device="cpu", every={"old": 2}
    )
    assert (several.names, several.every) == (["train", "valid", "old"], {"old": 2})
    assert [batch.tolist() for batch in several.old] == [[0, 1, 2]]
    assert several.old.batch_size == 4


def test_a_seed_is_kept_for_the_data_of_every_fit():
    assert DataLoaders.from_dsets(range(4), seed=3).seed == 3
    assert DataLoaders.from_dsets(range(4)).seed is None


def test_loaders_show_their_sizes():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    assert repr(dls()) == "DataLoaders(3 batches, 2 batches, bs=4, device=cpu)"
    assert repr(DataLoaders(DataLoader(Stream(), 2), device="cpu")) == "DataLoaders(? batches, bs=2, device=cpu)"
    assert repr(DataLoaders([], device="cpu")) == "DataLoaders(0 batches, bs=None, device=cpu)"


def test_named_loaders_show_their_names_and_how_often_they_are_validated():
    several = named([[3]], {"noisy": [[4], [5]], "old": [[6]]}, every={"old": 5})
    sizes = "1 batches, 1 batches, 1 batches, noisy: 2 batches, old: 1 batches every 5 epochs"
    assert repr(several) == f"DataLoaders({sizes}, bs=None, device=cpu)"


def test_in_a_cell_loaders_are_a_table():
    x = torch.zeros(10, 2)
    dls = DataLoaders(TensorLoader(x, bs=4), {"<odd>": [x]}, every={"<odd>": 3}, device="cpu")
    shown = dls._repr_html_()
    assert "<td>train</td><td>TensorLoader</td><td>3</td><td>4</td><td>10</td><td></td>" in shown
    assert "<td>&lt;odd&gt;</td><td>list</td><td>1</td><td></td><td></td><td>every 3 epochs</td>" in shown


def test_the_loaders_draw_a_batch_as_the_learner_does():
    x = torch.rand(8, 1, 4, 4)
    dls = DataLoaders(TensorLoader(x, torch.arange(8) % 2, bs=4), TensorLoader(x + 1, torch.zeros(8).long(), bs=4))
    dls.vocab = ("cat", "dog")
    assert [ax.get_title() for ax in dls.show_batch(max_n=3).axes] == ["cat", "dog", "cat"]
    assert [ax.get_title() for ax in dls.show_batch("valid", max_n=2, figsize=(1, 1)).axes] == ["cat", "cat"]
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match=rf"^`max_n={wrong}`: pass how many samples to draw, 1 or more\.$"):
            dls.show_batch(max_n=wrong)
    with pytest.raises(KeyError, match=r"there is no loader `vaild`; .* Did you mean `valid`"):
        dls.show_batch("vaild")
