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
    for i in range(1034):
        kept.losses.append(torch.tensor(float(i)))
        kept.fold()
    assert [len(block) for block in kept.folded] == [1024, 10]
    assert kept.since(1031) == [1031.0, 1032.0, 1033.0]
    assert kept.since(1023)[:2] == [1023.0, 1024.0]


def test_more_than_1024_tensors_become_one():
    kept, numbers = Kept(), []
    for i in range(1025):
        dtype = torch.float64 if i % 2 else torch.float32  # which begins a block each time
        kept.losses.append(torch.tensor(float(i), dtype=dtype))
        kept.fold()
        numbers.append(len(kept.folded))
    assert numbers == [*range(1, 1025), 1]
    kept.losses.append(torch.tensor(1025.0))
    assert kept.since(0) == [float(i) for i in range(1026)]


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


def test_of_a_loss_of_several_numbers_the_mean_is_kept():
    kept = kept_of([1.0, 3.0], 0.5)
    assert kept.since(0) == [2.0, 0.5]


@pytest.mark.parametrize(
    "losses",
    [
        (torch.tensor(1.0, device="meta"), torch.tensor(2.0)),
        (torch.tensor(1.0), torch.tensor([2.0, 3.0], device="meta")),
        (torch.tensor(1.0), torch.tensor([2.0, 3.0], device="meta"), 4),
    ],
    ids=["the first", "the first of several numbers", "the first of several numbers or of none of torch's"],
)
def test_losses_of_several_devices_come_to_that_of_one_of_them(losses):
    kept = Kept()
    kept.losses += losses
    kept.fold()
    (block,) = kept.folded
    assert (block.device.type, block.shape) == ("meta", (len(losses),))


def test_a_single_number_among_tensors_becomes_one_of_them():
    kept = kept_of(1.0)
    kept.losses.append(4)
    assert kept.since(0) == [1.0, 4.0]


def test_losses_come_to_the_device_of_the_last():
    kept = kept_of(1.0)
    for loss in (torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, device="meta")):
        kept.fold()
        kept.losses.append(loss)
    (block,) = kept.state_dict()["losses"]
    assert (block.device.type, block.shape) == ("meta", (3,))


def test_on_the_host_all_losses_have_arrived():
    kept = kept_of(1.0, 2.0, 3.0)
    assert (kept.arrived(0), kept.arrived(2), kept.arrived(3)) == ([1.0, 2.0, 3.0], [3.0], [])


def test_a_state_holds_everything_and_goes_on():
    kept, other = kept_of(1.0, 2.0), Kept()
    kept.rates += [0.1, 0.2]
    other.load_state_dict(kept.state_dict())
    other.losses.append(torch.tensor(3.0))
    assert (other.since(0), other.rates, len(other)) == ([1.0, 2.0, 3.0], [0.1, 0.2], 3)


def test_a_state_that_is_loaded_replaces_what_was_kept():
    kept = kept_of(7.0, 8.0, 9.0)
    kept.fold()
    kept.load_state_dict(kept_of(1.0).state_dict())
    kept.losses.append(torch.tensor(2.0))
    assert kept.since(0) == [1.0, 2.0]


def test_a_state_has_its_losses_in_one_tensor_and_those_that_follow_come_behind():
    kept = kept_of(1.0)
    kept.fold()
    kept.losses.append(torch.tensor(2.0, dtype=torch.float64))
    assert [block.tolist() for block in kept.state_dict()["losses"]] == [[1.0, 2.0]]
    kept.losses.append(torch.tensor(3.0, dtype=torch.float64))
    assert kept.since(0) == [1.0, 2.0, 3.0]


def saying(name):
    """Tensors on the host that say they are on another device."""

    class Tensor(torch.Tensor):
        device = property(lambda self: torch.device(name))

        def to(self, device):
            return self.as_subclass(ON[str(device)])

    return Tensor


ON = {name: saying(name) for name in ("cpu", "cuda:0", "cuda:1")}


class Pinned(torch.Tensor):
    """Memory to which a GPU copies while the host goes on."""

    def copy_(self, numbers, non_blocking=False):
        assert non_blocking
        return super().copy_(numbers.as_subclass(torch.Tensor))


class Event:
    """A place in the work of a GPU that is done with what it was handed when `is_done` says so."""

    is_done = False

    def __init__(self):
        self.stream = None

    def record(self, stream):
        self.stream = stream

    def query(self):
        return self.stream is None or Event.is_done


@pytest.fixture
def gpu(monkeypatch):
    def pinned(shape, dtype, pin_memory):
        assert pin_memory
        return torch.full(shape, torch.nan, dtype=dtype).as_subclass(Pinned)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(Event, "is_done", False)
    return lambda *losses, device="cuda:0": [torch.tensor(loss).as_subclass(ON[device]) for loss in losses]


def test_losses_on_a_gpu_arrive_when_it_is_done_with_their_copy(gpu, monkeypatch):
    kept = Kept()
    kept.losses += gpu(1.0, 2.0)
    looks = [kept.arrived(0)]
    kept.losses += gpu(3.0)
    looks.append(kept.arrived(0))
    monkeypatch.setattr(Event, "is_done", True)
    looks += [kept.arrived(1), kept.arrived(2)]
    assert looks == [[], [], [2.0], [3.0]]


def test_losses_on_a_gpu_are_sent_once_those_before_have_arrived(gpu, monkeypatch):
    monkeypatch.setattr(Event, "is_done", True)
    kept, found = Kept(), []
    for loss in (1.0, 2.0, 3.0):
        kept.losses += gpu(loss)
        found.append(kept.arrived(sum(map(len, found))))
    assert found == [[], [1.0], [2.0]] and kept.arrived(2) == [3.0] and kept.arrived(3) == []


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


def test_losses_of_several_devices_arrive_from_that_of_the_last(gpu, monkeypatch):
    kept = Kept()
    for loss, device in enumerate(ON):
        kept.fold()
        kept.losses += gpu(float(loss), device=device)
    assert kept.arrived(0) == [] and kept._sent.done.stream == "stream of cuda:1"
    monkeypatch.setattr(Event, "is_done", True)
    assert kept.arrived(0) == [0.0, 1.0, 2.0]
