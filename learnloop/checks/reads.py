"""How often a training batch waits for the device: tensors brought to the host, and operations that need them there."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from learnloop.loop.callback import Callback

_aten = torch.ops.aten
#: Operations whose result, or its shape, the host has to know before it goes on.
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
#: Methods that copy a tensor to the host: without an accelerator they do nothing that an operation would show.
_METHODS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}


class HostReads(Callback):
    """Counts in `count` how often the host waits for the device, in training batches alone; a context around a fit."""

    order = -1e9
    run_valid = False

    def __init__(self) -> None:
        self.count = self.n_batches = 0
        self._is_batch = False
        self._modes = (_Operations(self), _Methods(self))

    def __enter__(self) -> "HostReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc)

    def before_batch(self) -> None:
        self._is_batch = True
        self.n_batches += 1

    def cleanup_batch(self) -> None:
        self._is_batch = False

    def saw(self) -> None:
        """One more, if a training batch is running."""
        self.count += self._is_batch

    @property
    def per_batch(self) -> float:
        """How often in a training batch, on average."""
        return self.count / max(1, self.n_batches)


class _Operations(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _WAITING or (func in _COPIES and _comes_to_the_host(func, args, result)):
            self.reads.saw()
        return result


def _comes_to_the_host(func: Any, args: Any, result: Any) -> bool:
    source = args[1] if func is _aten.copy_.default else args[0]
    return result.device.type == "cpu" != source.device.type


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.reads.count
        result = func(*args, **(kwargs or {}))
        if func in _METHODS and self.reads.count == before:  # not seen as an operation
            self.reads.saw()
        return result
