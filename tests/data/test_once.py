"""Loaders for predictions: every sample once, nothing dropped, the order known."""

import pytest
import torch
from fastcore.foundation import L
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from learnloop import DataLoaders, TensorLoader
from learnloop.data.once import first_sample, in_dataset_order, once, one_item_batch, samples_at
from learnloop.data.show import label_of, nth

DATASET = TensorDataset(torch.arange(10), -torch.arange(10))


def samples(dl):
    return [int(i) for batch in dl for i in batch[0]]


def test_a_shuffled_torch_loader_that_drops_is_read_in_order_and_whole():
    again, order = once(DataLoader(DATASET, batch_size=4, shuffle=True, drop_last=True))
    assert (samples(again), order) == (list(range(10)), None)
    assert [len(batch[0]) for batch in again] == [4, 4, 2]


def test_our_own_loader_is_read_in_order_and_whole():
    dl = TensorLoader(torch.arange(10), bs=4, shuffle=True, drop_last=True, seed=1)
    assert samples(once(dl)[0]) == list(range(10))


@pytest.mark.parametrize("n", [10, 25])
def test_a_weighted_sampler_gives_every_sample_once(n):
    dl = DataLoader(DATASET, batch_size=4, sampler=WeightedRandomSampler(torch.ones(10), n))
    assert samples(once(dl)[0]) == list(range(10))


def test_a_subset_stays_a_subset():
    dl = DataLoader(DATASET, batch_size=2, sampler=SubsetRandomSampler([7, 2, 5]))
    assert samples(once(dl)[0]) == [2, 5, 7]


def test_a_sampler_of_ones_own_keeps_its_order_which_is_told():
    again, order = once(DataLoader(DATASET, batch_size=2, sampler=[4, 1, 9], drop_last=True))
    assert (samples(again), order) == ([4, 1, 9], [[4, 1], [9]])


def test_batches_put_together_on_purpose_stay_together():
    again, order = once(DataLoader(DATASET, batch_sampler=[[8, 1], [0, 2, 4]]))
    assert (samples(again), order) == ([8, 1, 0, 2, 4], [[8, 1], [0, 2, 4]])


def test_without_reordering_a_loader_keeps_its_order_and_drops_nothing():
    again, order = once(
        DataLoader(DATASET, batch_size=4, sampler=list(range(9, -1, -1)), drop_last=True), in_order=False
    )
    assert (samples(again), order) == (list(range(9, -1, -1)), None)


def test_a_loader_is_rebuilt_with_its_way_of_collating():
    dl = DataLoader(DATASET, batch_size=5, shuffle=True, collate_fn=lambda items: [sum(x for x, _ in items)])
    assert [int(batch[0]) for batch in once(dl)[0]] == [0 + 1 + 2 + 3 + 4, 5 + 6 + 7 + 8 + 9]


def test_a_loader_without_batches_of_its_own_is_read_in_order():
    class Whole(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return (torch.tensor([2 * i, 2 * i + 1]),)

    assert samples(once(DataLoader(Whole(), batch_size=None, shuffle=True))[0]) == list(range(6))


def test_what_cannot_be_rebuilt_is_handed_back():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(DATASET)

    for dl in [DataLoader(Stream(), batch_size=2), [DATASET[:3]], iter([DATASET[:3]])]:
        assert once(dl) == (dl, None)


def test_what_was_gathered_is_sorted_whatever_its_structure():
    gathered = (torch.tensor([[2.0, 0.0, 1.0]]), {"a": torch.tensor([[20, 0, 10]])})
    ordered = in_dataset_order(gathered, [2, 0, 1], dim=1)
    assert ordered[0].tolist() == [[0, 1, 2]]
    assert ordered[1]["a"].tolist() == [[0, 10, 20]]
    assert in_dataset_order(L("c", "a", "b"), [2, 0, 1]) == ["a", "b", "c"]
    assert in_dataset_order(None, [1, 0]) is None


def loaders(dataset=DATASET, **kwargs):
    return DataLoaders(DataLoader(dataset, batch_size=4, **kwargs), device="cpu")


def test_one_item_becomes_a_batch_of_one():
    (batch,) = one_item_batch(loaders(), torch.tensor([1.0, 2.0]))
    assert batch.tolist() == [[1, 2]]


def test_a_list_of_numbers_is_one_input():
    (batch,) = one_item_batch(loaders(), [1.0, 2.0])
    assert batch.tolist() == [[1, 2]]


def test_an_item_is_collated_as_the_loader_collates():
    (batch,) = one_item_batch(loaders(collate_fn=lambda items: torch.stack(items) * 10), torch.tensor([1.0]))
    assert batch.tolist() == [[10]]


def test_of_a_whole_sample_only_the_inputs_are_inputs():
    dl = one_item_batch(loaders(), DATASET[3])
    assert ([part.tolist() for part in dl[0]], dl.n_inp) == ([[3], [-3]], 1)


def test_a_tuple_of_inputs_alone_are_all_inputs():
    dls = DataLoaders(TensorLoader(torch.ones(4), torch.ones(4), torch.ones(4)), n_inp=2, device="cpu")
    assert one_item_batch(dls, (torch.tensor(1.0), torch.tensor(2.0))).n_inp == 2


def test_a_mapping_is_one_input():
    (batch,) = one_item_batch(loaders(), {"a": torch.tensor(1), "b": torch.tensor(2)})
    assert {key: value.tolist() for key, value in batch.items()} == {"a": [1], "b": [2]}


def test_the_first_sample_of_any_structure():
    first = first_sample((torch.tensor([[1, 2], [3, 4]]), {"a": torch.tensor([5, 6])}))
    assert (first[0].tolist(), first[1]["a"].item()) == ([1, 2], 5)
    assert first_sample(None) is None


@pytest.mark.parametrize(
    ("vocab", "decoded", "label"),
    [
        (["cat", "dog"], torch.tensor(1), "dog"),
        (["cat", "dog"], torch.tensor([True, False]), ["cat"]),
        (["a", "b", "c"], torch.tensor([2, 0]), ["c", "a"]),
    ],
)
def test_a_label_is_read_from_the_vocabulary(vocab, decoded, label):
    assert label_of(vocab, decoded) == label


def test_without_a_vocabulary_or_a_class_the_label_is_the_prediction():
    decoded = torch.tensor(1)
    assert label_of(None, decoded) is decoded
    number = torch.tensor(0.5)
    assert label_of(["cat"], number) is number


# Some samples


def mapping_of(x):
    return {"x": x, "words": [f"word {i}" for i in x.tolist()]}


@pytest.mark.parametrize(
    "dl",
    [
        TensorLoader(torch.arange(10), bs=4, shuffle=True),
        DataLoader([(i,) for i in range(10)], 4, shuffle=True),
        [(torch.arange(i, min(i + 4, 10)),) for i in range(0, 10, 4)],
    ],
    ids=["ours", "torch", "a list"],
)
def test_samples_are_read_by_their_numbers_in_the_order_asked_for(dl):
    state = torch.get_rng_state()
    (x,) = samples_at(dl, [7, 2, 9])
    assert x.tolist() == [7, 2, 9]
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_may_be_mappings_with_words():
    stream = [mapping_of(torch.arange(0, 4)), mapping_of(torch.arange(4, 6))]
    found = samples_at(stream, [5, 1])
    assert (found["x"].tolist(), found["words"]) == ([5, 1], ["word 5", "word 1"])
    assert nth(stream[0], 2)["words"] == "word 2"


def test_a_number_beyond_the_last_is_an_error():
    with pytest.raises(IndexError, match="there is no sample 7: the loader gave 6, numbered from 0"):
        samples_at([torch.zeros(4), torch.zeros(2)], [7, 0])
