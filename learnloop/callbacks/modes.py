"""The model's mode and place."""

from typing import Any

from torch import nn

from learnloop.loop.callback import Callback


class TrainEvalCallback(Callback):
    """Moves model and loss to the device, resets the model, sets the mode of the phase. Cost per batch: none."""

    order = -10

    def before_fit(self) -> None:
        """The model goes where `dls.device` says; a model with a `reset` method is reset."""
        learn = self.learn
        device = getattr(learn.dls, "device", None)
        for part in (learn.model, learn.loss_func):
            if isinstance(part, nn.Module) and device is not None:
                part.to(device)
        reset: Any = getattr(learn.model, "reset", None)
        if callable(reset):
            reset()

    def before_train(self) -> None:
        self._set_mode(True)

    def before_validate(self) -> None:
        self._set_mode(False)

    def cleanup_fit(self) -> None:
        self._set_mode(False)  # also where there was no validation that would have done it

    def _set_mode(self, training: bool) -> None:
        model = self.learn.model
        if isinstance(model, nn.Module):
            model.train(training)
