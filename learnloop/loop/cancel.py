"""Exceptions that leave a span on purpose: raised by a callback, absorbed where the span ends."""


class CancelException(Exception):
    """Leaves a span on purpose. Raise one of its subclasses; a plain one is absorbed by nobody."""


class CancelBatchException(CancelException):
    """Skips the rest of this batch: `after_cancel_batch`, `after_batch`, then the next batch."""


class CancelTrainException(CancelException):
    """Skips the rest of this training phase: `after_cancel_train`, `after_train`, then validation."""


class CancelValidException(CancelException):
    """Skips the rest of this validation phase: `after_cancel_validate`, `after_validate`."""


class CancelEpochException(CancelException):
    """Skips the rest of this epoch: `after_cancel_epoch`, `after_epoch`, then the next epoch."""


class CancelFitException(CancelException):
    """Ends the fit in an orderly way: `after_cancel_fit`, `after_fit`."""


class CancelBackwardException(CancelException):
    """Skips the backward pass: `after_cancel_backward`, `after_backward`; the step still runs."""


class CancelStepException(CancelException):
    """Skips the optimizer's step: `after_cancel_step`, `after_step`; gradients are cleared all the same."""
