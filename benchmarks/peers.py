"""Other training loops, doing the same work: each takes a `Job` and gives a function that does it.

Everything optional is off: logging, files, bars, warnings. The batches, the network and the plain torch optimizer are
those of the hand-written loop. A function that is called again goes on with the same model and optimizer.
"""

import contextlib
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from fastcore.basics import noop
from loops import EVENTS, Job, listeners, right
from torch import nn

Run = Callable[[], Any]


class Peer(NamedTuple):
    """Another library's loop."""

    name: str
    module: str  # what is imported
    package: str  # what is installed
    train: Callable[[Job], Run]
    validate: Callable[[Job], Run] | None = None  # loss and accuracy on `job.valid`
    needs: tuple[str, ...] = ()  # what else must be there
    n_handlers: int = 0  # handlers per batch of a listener; 0: the library has no such thing

    @property
    def is_installed(self) -> bool:
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why it cannot be measured here; None where it can."""
        return next(filter(None, map(why_not, (*self.needs, self.module))), None)

    @property
    def version(self) -> str:
        return metadata.version(self.package)


@cache
def why_not(module: str) -> str | None:
    """Why a peer cannot be measured here; None where it can."""
    try:
        with silent():
            _import(module)
    except Exception as error:  # a package built for another torch fails with anything
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception:
        if not _torchvision_misses_operators():
            raise
        importlib.import_module(module)


@cache
def _torchvision_misses_operators() -> bool:
    """Defines what a torchvision that was built for another torch misses: some peers import it unasked."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return False
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # what it defined goes with it
    return True


_KEPT: list[Any] = []


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No warning and no line of a log below an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def silently(run: Run) -> Run:
    def silent_run() -> None:
        with silent():
            run()

    return silent_run


def _stop(job: Job) -> Run:
    """Stops the stopwatch of the batches, for loops that never ask for the end of their loader."""
    return getattr(job.train, "stop", noop)


# Ignite


def ignite(job: Job) -> Run:
    from ignite.engine import Events, create_supervised_trainer

    kept = {"output_transform": lambda x, y, pred, loss: loss.detach()}  # its default reads the loss on the host
    trainer = create_supervised_trainer(job.model, job.optimizer(), job.loss_func, **kept)
    moments = (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED)
    handlers = [getattr(cb, event) for event in EVENTS for cb in listeners(object, job.listeners)]
    for i, handler in enumerate(handlers):
        trainer.add_event_handler((*moments, Events.ITERATION_COMPLETED)[i % 4], handler)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, _stop(job))
    if job.valid is not None:
        evaluator = _ignite_evaluator(job)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(job.valid))
    return partial(trainer.run, job.train, max_epochs=job.n_epoch)


def ignite_validation(job: Job) -> Run:
    from ignite.engine import Events

    evaluator = _ignite_evaluator(job)
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, getattr(job.valid, "stop", noop))
    return partial(evaluator.run, job.valid)


def _ignite_evaluator(job: Job) -> Any:
    from ignite.engine import create_supervised_evaluator
    from ignite.metrics import Accuracy, Loss

    return create_supervised_evaluator(job.model, metrics={"loss": Loss(job.loss_func), "accuracy": Accuracy()})


# skorch


def skorch(job: Job) -> Run:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback, EpochScoring

    class Net(NeuralNetClassifier):
        """Trains on loaders that are there already."""

        def get_split_datasets(self, X: Any, y: Any = None, **params: Any) -> tuple[Any, Any]:
            return X

        def get_iterator(self, dataset: Any, training: bool = False) -> Any:
            return dataset

    def share(net: Any, X: Any, y: Any) -> float:
        return float((net.predict(X) == y).mean())

    cbs = listeners(Callback, job.listeners, SKORCH_EVENTS, "self, net, *args, **kwargs")
    if job.valid is not None:
        cbs.append(("accuracy", EpochScoring(share, name="valid_accuracy", lower_is_better=False)))
    net = Net(
        job.model,
        criterion=job.loss_func,
        optimizer=lambda params, **hypers: job.opt_func([p for _, p in _named(params)], lr=job.lr),
        callbacks=cbs,
        callbacks__print_log=None,
        callbacks__valid_acc=None,
        iterator_train=None,
    )
    with silent():
        net.initialize()
    return partial(net.fit_loop, (job.train, job.valid), epochs=job.n_epoch)


SKORCH_EVENTS = ("on_batch_begin", "on_grad_computed", "on_batch_end")


def _named(params: Any) -> list[tuple[str, nn.Parameter]]:
    """skorch gives groups."""
    return [(str(i), p) for i, p in enumerate(p for group in params for p in group["params"])]


# accelerate


def accelerate(job: Job) -> Run:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, opt, train, valid = accelerator.prepare(job.model, job.optimizer(), job.train, job.valid)

    def run() -> None:
        for _ in range(job.n_epoch):
            model.train()
            for x, y in train:
                loss = job.loss_func(model(x), y)
                accelerator.backward(loss)
                opt.step()
                opt.zero_grad()
            if valid is not None:
                _validate_with(accelerator, model, job.loss_func, valid)

    return run


def accelerate_validation(job: Job) -> Run:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, valid = accelerator.prepare(job.model, job.valid)
    return partial(_validate_with, accelerator, model, job.loss_func, valid)


def _validate_with(accelerator: Any, model: nn.Module, loss_func: nn.Module, valid: Any) -> tuple[float, float]:
    model.eval()
    loss, n_right, count = torch.tensor(0.0), torch.tensor(0), 0
    with torch.no_grad():
        for x, y in valid:
            pred = model(x)
            pred, y = accelerator.gather_for_metrics((pred, y))
            loss += loss_func(pred, y) * len(y)
            n_right += right(pred, y).sum()
            count += y.numel()
    return loss.item() / count, n_right.item() / count


# The Trainer of transformers


def transformers(job: Job) -> Run:
    from transformers import TrainerCallback

    trainer = _trainer_of_transformers(job)
    events = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
    for cb in listeners(TrainerCallback, job.listeners, events, "self, args, state, control, **kwargs"):
        trainer.add_callback(cb)

    class Stopwatch(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _stop(job)()

    trainer.add_callback(Stopwatch())
    return silently(trainer.train)


def transformers_validation(job: Job) -> Run:
    return silently(_trainer_of_transformers(job).evaluate)


def _trainer_of_transformers(job: Job) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Ready(Trainer):
        """Takes the loaders that are there."""

        def get_train_dataloader(self) -> Any:
            return Named(job.train)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return Named(job.valid)

    opt = job.optimizer()
    with silent():
        trainer = Ready(
            WithLoss(job.model, job.loss_func),
            TrainingArguments(
                _folder(),
                num_train_epochs=job.n_epoch,
                eval_strategy="no" if job.valid is None else "epoch",
                **NOTHING_OPTIONAL,
            ),
            train_dataset=[],
            eval_dataset=[] if job.valid is not None else None,
            optimizers=(opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)),
            compute_metrics=lambda found: {"accuracy": found.predictions.mean()},
            preprocess_logits_for_metrics=right,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


NOTHING_OPTIONAL = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,  # a look at every loss
    "save_strategy": "no",
    "max_grad_norm": 0.0,
    "dataloader_pin_memory": False,
}


class WithLoss(nn.Module):
    """A model that computes its loss, as transformers has them."""

    def __init__(self, model: nn.Module, loss_func: nn.Module):
        super().__init__()
        self.model, self.loss_func = model, loss_func

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        pred = self.model(x)
        return {"loss": self.loss_func(pred, labels), "logits": pred}


class Named:
    """A loader's batches as mappings."""

    def __init__(self, loader: Any):
        self.loader, self.dataset = loader, getattr(loader, "dataset", loader)
        self.batch_size = getattr(loader, "batch_size", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for x, y in self.loader:
            yield {"x": x, "labels": y}


@cache
def _folder() -> str:
    """For files that nobody writes; removed when python ends."""
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    return folder.name


# Lightning


def lightning(job: Job) -> Run:
    module = _lightning_module(job)

    def run() -> None:
        _lightning_trainer(job).fit(module, job.train, job.valid)  # a Trainer trains once

    return silently(run)


def lightning_validation(job: Job) -> Run:
    module, trainer = _lightning_module(job), _lightning_trainer(job)
    return silently(partial(trainer.validate, module, job.valid, verbose=False))


LIGHTNING_EVENTS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
)


def _lightning_trainer(job: Job) -> Any:
    from lightning.pytorch import Callback, Trainer

    with silent():
        return Trainer(
            max_epochs=job.n_epoch,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=listeners(Callback, job.listeners, LIGHTNING_EVENTS, "self, *args"),
        )


def _lightning_module(job: Job) -> Any:
    from lightning.pytorch import LightningModule

    opt, stop = job.optimizer(), _stop(job)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, i: int) -> torch.Tensor:
            x, y = batch
            return job.loss_func(self.model(x), y)

        def on_train_epoch_end(self) -> None:
            if job.valid is None:
                stop()

        def on_validation_start(self) -> None:
            stop()  # a validation is a part of the epoch

        def validation_step(self, batch: Any, i: int) -> None:
            x, y = batch
            pred = self.model(x)
            found = {"loss": job.loss_func(pred, y), "accuracy": right(pred, y).float().mean()}
            self.log_dict(found, batch_size=len(y))

        def on_validation_epoch_end(self) -> None:
            getattr(job.valid, "stop", noop)()

        def configure_optimizers(self) -> Any:
            return opt

    return Module()


# fastai


def fastai(job: Job) -> Run:
    return partial(fastai_learner(job).fit, job.n_epoch)


def fastai_validation(job: Job) -> Run:
    return partial(fastai_learner(job).validate, dl=job.valid)


def fastai_learner(job: Job) -> Any:
    """No bar: fastai's comes with a module that is not imported here."""
    from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper, accuracy, default_device

    default_device(False)  # the CPU; `DataLoaders(device=…)` would ask lists to move themselves
    learn = Learner(
        DataLoaders(job.train, [] if job.valid is None else job.valid),
        job.model,
        job.loss_func,
        partial(OptimWrapper, opt=job.opt_func),
        lr=job.lr,
        cbs=listeners(Callback, job.listeners),
        metrics=partial(accuracy, axis=1) if job.valid is not None else None,
    )
    learn.logger = noop
    return learn


PEERS = (
    Peer("Ignite", "ignite.engine", "pytorch-ignite", ignite, ignite_validation, n_handlers=6),
    Peer("skorch", "skorch", "skorch", skorch, None, n_handlers=3),
    Peer("accelerate", "accelerate", "accelerate", accelerate, accelerate_validation),
    Peer("Lightning", "lightning.pytorch", "lightning", lightning, lightning_validation, n_handlers=6),
    Peer(
        "Hugging Face Trainer",
        "transformers.trainer",
        "transformers",
        transformers,
        transformers_validation,
        ("accelerate",),
        n_handlers=4,
    ),
    Peer("fastai", "fastai.basics", "fastai", fastai, fastai_validation, n_handlers=6),
)


def installed() -> list[Peer]:
    return [peer for peer in PEERS if peer.is_installed]


def missing() -> dict[str, str]:
    """The peers that cannot be measured here, and why."""
    return {peer.name: peer.reason for peer in PEERS if peer.reason is not None}


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
