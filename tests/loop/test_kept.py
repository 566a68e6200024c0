"""What the loop keeps of each batch, and when it comes to the host."""

import pytest
import torch

from learnloop.loop.kept import BLOCK, Kept


def kept_of(*losses):
    kept = Kept()
    kept.losses += [torch.tensor(loss) for loss in losses]
    return kept


def test_losses_come_in_order_from_any_number_on():
    kept = kept_of(1.0, 2.0)
    kept.fold()
    kept.losses.append(torch.tensor(3.0))
    assert [kept.since(start) for start in range(4)] == [[1.0, 2.0, 3.0], [2.0, 3.0], [3.0], []]


def test_folding_after_every_batch_keeps_the_number_of_tensors_bounded():
    kept = Kept()
    for i in range(BLOCK + 10):
        kept.losses.append(torch.tensor(float(i)))
        kept.fold()
    assert [len(block) for block in kept.folded] == [BLOCK, 10]
    assert kept.since(BLOCK + 7) == [BLOCK + 7.0, BLOCK + 8.0, BLOCK + 9.0]
    assert kept.since(BLOCK - 1)[:2] == [BLOCK - 1.0, BLOCK]


@pytest.mark.parametrize(
    ("pred", "n"),
    [
        (torch.zeros(64, 10), 409),  # a MiB of them
        (torch.zeros(2, dtype=torch.float64), BLOCK),
        ((torch.zeros(1 << 16), {"more": [torch.zeros(1 << 15), "text"]}), 2),
        (torch.zeros(1 << 19), 1),
        (None, BLOCK),
    ],
)
def test_as_many_losses_stay_single_as_keep_a_mebibyte_of_predictions_from_being_used_again(pred, n):
    kept, singles = Kept(), []
    for _ in range(2 * n + 1):
        kept.losses.append(torch.tensor(1.0))
        if len(kept.losses) >= kept.room:
            kept.make_room(pred)
        singles.append(len(kept.losses))
    assert (kept.room, max(singles), singles[-1], len(kept)) == (n, max(1, n - 1) if n > 1 else 0, 1 % n, 2 * n + 1)


def test_losses_of_another_dtype_begin_a_block_and_all_come_in_order():
    kept = kept_of(1.0, 2.0)
    kept.fold()
    kept.losses.append(torch.tensor(3.0, dtype=torch.float64))
    kept.fold()
    kept.losses.append(torch.tensor(4.0, dtype=torch.float64))
    assert kept.since(0) == [1.0, 2.0, 3.0, 4.0]
    assert [(block.dtype, len(block)) for block in kept.folded] == [(torch.float32, 2), (torch.float64, 2)]


def test_more_losses_than_a_block_has_room_for_are_one():
    kept = kept_of(*map(float, range(BLOCK + 1)))
    assert len(kept.since(0)) == BLOCK + 1 and len(kept.folded) == 1


def test_a_state_stays_as_it_was_when_losses_come():
    kept = kept_of(1.0, 2.0)
    (block,) = kept.state_dict()["losses"]
    kept.losses.append(torch.tensor(3.0))
    assert kept.since(0) == [1.0, 2.0, 3.0] and block.tolist() == [1.0, 2.0]
    assert block.untyped_storage().nbytes() == 8  # not the room for more


def test_losses_of_several_kinds_become_one_tensor():
    kept = Kept()
    kept.losses += [torch.tensor([1.0, 3.0]), 4, torch.tensor(0.5)]
    assert kept.since(0) == [2.0, 4.0, 0.5]


def test_a_single_number_among_tensors_becomes_one_of_them():
    kept = kept_of(1.0)
    kept.losses.append(4)
    assert kept.since(0) == [1.0, 4.0]


def test_losses_come_to_the_device_of_the_last():
    kept = kept_of(1.0)
    kept.fold()
    kept.losses.append(torch.tensor(2.0, device="meta"))
    (block,) = kept.state_dict()["losses"]
    assert (block.device.type, block.shape) == ("meta", (2,))


def test_on_the_host_all_losses_have_arrived():
    kept = kept_of(1.0, 2.0, 3.0)
    assert (kept.arrived(0), kept.arrived(2), kept.arrived(3)) == ([1.0, 2.0, 3.0], [3.0], [])


def test_a_state_holds_everything_and_goes_on():
    kept, other = kept_of(1.0, 2.0), Kept()
    kept.rates += [0.1, 0.2]
    other.load_state_dict(kept.state_dict())
    other.losses.append(torch.tensor(3.0))
    assert (other.since(0), other.rates, len(other)) == ([1.0, 2.0, 3.0], [0.1, 0.2], 3)


def test_a_state_has_its_losses_in_one_tensor_however_often_somebody_looked():
    kept = kept_of(1.0)
    kept.fold()
    kept.losses.append(torch.tensor(2.0))
    assert [block.tolist() for block in kept.state_dict()["losses"]] == [[1.0, 2.0]]


@pytest.mark.gpu
def test_on_a_gpu_losses_arrive_one_look_later_and_nothing_waits_for_them():
    kept = Kept()
    kept.losses += [torch.tensor(loss, device="cuda") for loss in (1.0, 2.0)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = kept.arrived(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    kept.losses.append(torch.tensor(3.0, device="cuda"))
    assert (first, kept.arrived(0)) == ([], [1.0, 2.0])
    torch.cuda.synchronize()
    assert (kept.arrived(2), kept.since(0)) == ([3.0], [1.0, 2.0, 3.0])
