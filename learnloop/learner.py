"""The Learner: a model, data, a loss and an optimizer together, with everything that one can type on it."""

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fastcore.basics import noop
from fastcore.foundation import L
from torch import nn

from learnloop import html
from learnloop.callbacks.checkpoints import stored_for
from learnloop.callbacks.data import augmenting
from learnloop.callbacks.execution import ChannelsLast
from learnloop.callbacks.lr_finder import LRFinder, SuggestionMethod, rules_by_name, suggested
from learnloop.callbacks.modes import TrainEvalCallback
from learnloop.callbacks.precision import MixedPrecision
from learnloop.callbacks.predictions import GatherPredsCallback, blended_preds
from learnloop.callbacks.progress import ProgressCallback
from learnloop.callbacks.recorder import Recorder
from learnloop.callbacks.schedule import ParamScheduler
from learnloop.checkpoint import SAFETENSORS, load_model, save_model, weights_path
from learnloop.data.batches import to_detach
from learnloop.data.keyed import draw_seed, preserved_randomness
from learnloop.data.once import first_sample, in_dataset_order, once, one_item_batch
from learnloop.data.show import label_of
from learnloop.export import export
from learnloop.insight.check import check
from learnloop.insight.explain import DryRun, Text, outline, rehearse
from learnloop.insight.findings import CheckReport
from learnloop.insight.profile import Profile, profile
from learnloop.insight.samples import show_batch, show_results
from learnloop.insight.summary import ModelSummary, summarize
from learnloop.loop.callback import Callback, nearest
from learnloop.loop.dispatch import listed
from learnloop.loop.fits import FitCall, run_fit, run_trial
from learnloop.loop.runs import end_run, run_beside
from learnloop.loop.spans import EPOCH, FIT, enter_span, run_span
from learnloop.loop.state import capture_or_point, restore
from learnloop.loop.training_loop import TrainingLoop
from learnloop.losses import unreduced
from learnloop.metrics import mk_metric
from learnloop.modules import total_params
from learnloop.optim.algorithms import Adam
from learnloop.optim.groups import by_name, norm_bias_params, trainable_params, with_names
from learnloop.optim.optimizer import NothingToTrain
from learnloop.optim.schedules import cos_restarts, cycle_lengths, flat_cos, one_cycle
from learnloop.optim.wrapper import OptimWrapper
from learnloop.seeds import set_seed
from learnloop.stored import Stored
from learnloop.verify import ResumeReport, verify

#: What a Learner takes where nothing is passed; change it to change every Learner made afterwards.
defaults = SimpleNamespace(
    lr=1e-3, wd=None, moms=(0.95, 0.85, 0.95), callbacks=[TrainEvalCallback, Recorder, ProgressCallback]
)


class Learner(TrainingLoop):
    """Trains a model on data: `Learner(dls, model, loss_func).fit(3)`.

    Attributes that it does not have itself are read from the model. Several learners train side by side, in threads
    too, as if each were alone, as long as each has a model, a loss and callbacks of its own: with `dls.seed` set and a
    keyed loader the data of one does not depend on the other. What they do share is torch's global generator: dropout
    and other draws of a model get other numbers, as random as alone, and so do loaders that are not keyed. Ctrl-C stops
    the one in the main thread.
    """

    lr: Any  # default learning rate: a number, a slice or one per group
    wd: Any  # default weight decay; None: the optimizer's own
    moms: tuple[float, float, float]  # momentum at the start, the middle and the end of one cycle
    path: Path  # where files go
    model_dir: str | Path  # the folder for models, below `path`
    logger: Callable[[Any], Any]  # gets each row of the recorder
    create_mbar: bool  # whether a fit shows a bar over its epochs

    _phase: int = 0  # number of the fit that runs, in a verb that makes several
    _rest: tuple[Any, int, Sequence[Callable[..., None]]] = (None, 0, ())  # a stopped fit's state and number; the next

    def __init__(
        self,
        dls: Any,  # DataLoaders, or anything with `train` and `valid`
        model: Any,  # a torch module, or any function of the inputs
        loss_func: Callable[..., Any] | None = None,  # (pred, *yb) -> one number; None: the data's or the model's own
        opt_func: Any = Adam,  # (groups, lr=…) -> optimizer; a class of torch.optim works too
        lr: Any = None,  # default learning rate; None: `defaults.lr`
        splitter: Any = trainable_params,  # model -> parameters, or lists of them: the groups; a dict as for `by_name`
        cbs: Any = None,  # a callback, or several
        metrics: Any = None,  # functions of (pred, *yb), or Metrics, computed on the validation set
        path: str | Path | None = None,
        model_dir: str | Path = "models",
        wd: float | None = None,  # default weight decay; None: `defaults.wd`
        wd_bn_bias: bool = False,  # weight decay on biases and normalization layers too
        train_bn: bool = True,  # normalization layers are trained in frozen groups too
        moms: tuple[float, float, float] | None = None,  # momentum in one cycle; None: `defaults.moms`
        default_cbs: bool = True,  # TrainEvalCallback, Recorder, ProgressCallback
    ):
        super().__init__()
        _check_parts(dls, model, loss_func)
        self.dls, self.model, self.opt_func = dls, model, opt_func
        self.splitter = splitter if callable(splitter) else by_name(splitter)
        self.loss_func = _loss_of(dls) if loss_func is None else loss_func
        self.lr = defaults.lr if lr is None else lr
        self.wd = defaults.wd if wd is None else wd
        self.moms = defaults.moms if moms is None else moms
        self.wd_bn_bias, self.train_bn = wd_bn_bias, train_bn
        self.path, self.model_dir = Path(path if path is not None else getattr(dls, "path", ".")), model_dir
        self.opt, self.logger, self.create_mbar = None, print, True
        self.metrics = metrics
        self.add_cbs([*(defaults.callbacks if default_cbs else []), *listed(cbs)])
        self("after_create")

    @property
    def metrics(self) -> L:
        """The metrics, each a `Metric`; set functions, Metrics or a mixed list."""
        return self._metrics

    @metrics.setter
    def metrics(self, metrics: Any) -> None:
        self._metrics: L = L(mk_metric(m) for m in listed(metrics))

    @property
    def smooth_loss(self) -> torch.Tensor:
        """The smoothed training loss; reading it waits for the device."""
        recorder = self.__dict__.get("recorder")
        value = None if recorder is None else recorder.smooth_loss.value
        if value is None:
            raise AttributeError("`smooth_loss` is there once a training batch was recorded.")
        return value

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("model")
        if model is not None and not name.startswith("__"):
            try:
                return getattr(model, name)
            except AttributeError:
                pass
        if isinstance(getattr(type(self), name, None), property):
            return object.__getattribute__(self, name)  # its getter failed: with what it says itself
        raise AttributeError(_Missing(name, self, model), name=name)

    # Training

    def fit(
        self,
        n_epoch: int | None = None,  # passes over the training set
        lr: Any = None,  # None: the learner's
        wd: float | None = None,  # None: the learner's, or the optimizer's own
        cbs: Any = None,  # callbacks for this fit only
        reset_opt: bool = False,  # a new optimizer
        start_epoch: int = 0,  # the first epoch to run, where earlier ones are done
        *,
        n_step: int | None = None,  # updates to make, instead of `n_epoch`
        valid_every: int | None = None,  # updates from one validation to the next; None: one at the end
        resume: Any = False,  # True: from the newest file of the Checkpoint among the callbacks; or a file or folder
        dry_run: bool = False,  # train nothing: return what each callback would do
    ) -> DryRun | None:
        """Trains for `n_epoch` epochs, or for `n_step` updates with a validation every `valid_every` of them.

        Ctrl-C ends it at the next batch boundary with a KeyboardInterrupt; `resume()` goes on from there. Another
        process goes on from a checkpoint by the same call with `resume=True`, which begins at the start where there is
        none yet.
        """
        call = FitCall(n_epoch, lr, wd, cbs, reset_opt, start_epoch, n_step, valid_every).checked(self)
        if dry_run:
            return rehearse(self, call)
        self._rest = Learner._rest
        stored = self._stored(resume, call.cbs)
        run_fit(self, replace(call, repeats=stored is not None), None if stored is None else stored.state)
        return None

    def _stored(self, resume: Any, cbs: Any) -> Stored | None:
        if isinstance(resume, Stored) or resume is False or resume is None:
            return resume or None
        return stored_for(self, [*self.cbs, *listed(cbs)], resume)

    def resume(self) -> None:
        """Goes on with the call that Ctrl-C stopped, or whose state was loaded, exactly from where it was."""
        if self._point is None:
            raise RuntimeError(
                "there is nothing to resume: no fit was stopped by Ctrl-C, or a second Ctrl-C cut it inside a batch. "
                "`fit(…)` starts anew."
            )
        point, number, rest = self._rest
        self._rest = Learner._rest
        if point is not self._point:  # what was stopped last is no phase of a longer call
            number, rest = 0, ()
        self._run_phases([self._go_on, *rest], number)

    def _go_on(self, resume: Any = None) -> None:
        state: dict[str, Any] = self._point  # type: ignore[assignment]
        run_fit(self, self._call_of(state).checked(self), state)

    def _fit_from(self, state: dict[str, Any] | None, **numbers: Any) -> None:
        """A fit, from a state if there is one."""
        run_fit(self, FitCall(**{"n_epoch": None, **numbers}).checked(self), state)

    def verify_resume(
        self,
        n_batch: int = 8,  # training batches
        stop: int | None = None,  # the batch before which it is stopped; None: the one in the middle
        cbs: Any = None,  # callbacks of the fit that is meant, such as a schedule
    ) -> ResumeReport:
        """Trains a copy for some batches, and another through a stop in between; says whether they agree to the bit.

        Both in fresh processes, where the learner can be pickled and made there. Callbacks that only read are left out.
        """
        return verify(self, n_batch, n_batch // 2 if stop is None else stop, listed(cbs))

    def check(
        self,
        only: Any = None,  # names of checks to run; None: all of them
        skip: Any = (),  # names of checks to leave out
        seconds: float = 10.0,  # the longest that one training of a check may take
    ) -> CheckReport:
        """Looks for what goes wrong in trainings: in model, loss and data. Nothing of the learner changes.

        The report is True as a bool where nothing was found; `report["gradients"]` has verdict, number, text and advice
        of one check. Shown as text in a terminal, as a table in a notebook. Some checks train a little, with an Adam of
        their own, without callbacks that only read or that augment. Source: Karpathy, "A Recipe for Training Neural
        Networks".
        """
        return check(self, only, skip, seconds)

    def profile(
        self,
        n: int = 20,  # updates that are measured
        warmup: int = 3,  # updates before them
        host_reads: bool = True,  # count calls that bring a tensor to the host
    ) -> Profile:
        """Trains a little, measures where the time goes, and undoes it; the report shows itself as a table.

        `.plot()` draws it, `.to_chrome(path)` writes a trace, `.parts["forward"].ms` and the rest are there as numbers.
        Callbacks that act in a whole fit only are left out: `fit(cbs=ProfileCallback())` measures them too.
        """
        return profile(self, n, warmup, host_reads)

    def _call_of(self, state: dict[str, Any]) -> FitCall:
        """The call that a state belongs to: its numbers, and the callbacks that came for the fit that was stopped."""
        n, cbs = state["counters"], None if self._call is None else self._call.cbs
        if n["n_step"] is not None:
            return FitCall(None, cbs=cbs, n_step=n["n_step"], valid_every=n["valid_every"])
        return FitCall(n["n_epoch"], cbs=cbs)

    def fit_one_cycle(
        self,
        n_epoch: int | None = None,
        lr_max: Any = None,  # the highest rate: a number, a slice or one per group; None: the learner's `lr`
        div: float = 25.0,  # the first rate is lr_max / div
        div_final: float = 1e5,  # the last rate is lr_max / div_final
        pct_start: float = 0.25,  # part of the training in which the rate goes up
        wd: float | None = None,
        moms: tuple[float, float, float] | None = None,  # None: the learner's
        cbs: Any = None,
        reset_opt: bool = False,
        start_epoch: int = 0,
        *,
        n_step: int | None = None,
        valid_every: int | None = None,
        resume: Any = False,  # as in `fit`
        dry_run: bool = False,  # as in `fit`
    ) -> DryRun | None:
        """Trains with one cycle: the rate up and down, momentum the other way (Smith, arXiv 1803.09820)."""
        moms = self.moms if moms is None else moms
        with self._opt_put_back(dry_run):
            scheds = one_cycle(self._rates(lr_max, reset_opt), moms, div, div_final, pct_start)
            numbers = {"start_epoch": start_epoch, "n_step": n_step, "valid_every": valid_every, "dry_run": dry_run}
            return self._fit_with(scheds, cbs, n_epoch, wd=wd, resume=resume, **numbers)

    def fit_flat_cos(
        self,
        n_epoch: int | None = None,
        lr: Any = None,  # the rate at first: a number, a slice or one per group; None: the learner's
        div_final: float = 1e5,  # the last rate is lr / div_final
        pct_start: float = 0.75,  # part of the training in which the rate stays
        wd: float | None = None,
        cbs: Any = None,
        reset_opt: bool = False,
        start_epoch: int = 0,
        *,
        n_step: int | None = None,
        valid_every: int | None = None,
        resume: Any = False,  # as in `fit`
        dry_run: bool = False,  # as in `fit`
    ) -> DryRun | None:
        """Trains at one rate, then lets it go down along half a cosine."""
        with self._opt_put_back(dry_run):
            scheds = {"lr": flat_cos(self._rates(lr, reset_opt), div_final, pct_start)}
            numbers = {"start_epoch": start_epoch, "n_step": n_step, "valid_every": valid_every, "dry_run": dry_run}
            return self._fit_with(scheds, cbs, n_epoch, wd=wd, resume=resume, **numbers)

    def fit_sgdr(
        self,
        n_cycles: int,
        cycle_len: int,  # epochs of the first cycle
        lr_max: Any = None,  # the rate at the start of each: a number, a slice or one per group; None: the learner's
        cycle_mult: int = 2,  # each cycle is so many times as long as the one before
        cbs: Any = None,
        reset_opt: bool = False,
        wd: float | None = None,
        start_epoch: int = 0,
        resume: Any = False,  # as in `fit`
        dry_run: bool = False,  # as in `fit`
    ) -> DryRun | None:
        """Trains in cycles; in each the rate goes from `lr_max` to 0 (Loshchilov and Hutter, arXiv 1608.03983)."""
        lengths = cycle_lengths(n_cycles, cycle_len, cycle_mult)
        with self._opt_put_back(dry_run):
            scheds = {"lr": cos_restarts(self._rates(lr_max, reset_opt), lengths)}
            numbers = {"start_epoch": start_epoch, "dry_run": dry_run}
            return self._fit_with(scheds, cbs, sum(lengths), wd=wd, resume=resume, **numbers)

    def _fit_with(self, scheds: dict[str, Any], cbs: Any, n_epoch: int | None, **kwargs: Any) -> Any:
        return self.fit(n_epoch, cbs=[ParamScheduler(scheds), *listed(cbs)], **kwargs)

    @contextmanager
    def _opt_put_back(self, is_dry: bool) -> Iterator[None]:
        """A context in which a schedule may make the optimizer that it reads; a dry run leaves none."""
        former = self.opt, self.lr
        try:
            yield
        finally:
            if is_dry:
                self.opt, self.lr = former

    def _rates(self, lr: Any, reset_opt: bool) -> np.ndarray:
        """A rate per group, of a new optimizer where there is none or a new one is asked for; None: the learner's."""
        if self.opt is None or reset_opt:
            self.create_opt()
        return np.array(self.opt.or_own("lr", self.lr) if lr is None else self.opt.per_group("lr", lr))

    def fine_tune(
        self,
        epochs: int,  # with all groups trained
        base_lr: float = 2e-3,  # the highest rate of the last group while the others are frozen, then half of it
        freeze_epochs: int = 1,  # before, with all groups but the last frozen
        lr_mult: float = 100,  # the first group's rate is that of the last by this
        pct_start: float = 0.3,
        div: float = 5.0,
        resume: Any = False,  # as in `fit`; phases that were finished are left out
        **kwargs: Any,  # of both `fit_one_cycle`: div_final wd moms cbs reset_opt start_epoch
    ) -> None:
        """Trains the last group alone, then all of them with rates that grow from the first to the last."""
        if kwargs.get("dry_run"):
            raise TypeError("`fine_tune` makes two fits. Look at one: `learn.fit_one_cycle(…, dry_run=True)`.")
        lrs = slice(base_lr / 2 / lr_mult, base_lr / 2)
        phases = [
            partial(self._tune, -1, freeze_epochs, slice(base_lr), pct_start=0.99, **kwargs),
            partial(self._tune, 0, epochs, lrs, pct_start=pct_start, div=div, **kwargs),
        ]
        stored = self._stored(resume, kwargs.get("cbs"))
        first = 0 if stored is None else stored.phase
        self._run_phases(phases[first:], first, stored)

    def _tune(self, freeze_to: int, *args: Any, **kwargs: Any) -> None:
        self.freeze_to(freeze_to)
        self.fit_one_cycle(*args, **kwargs)

    def _run_phases(self, phases: Sequence[Callable[..., None]], first: int, stored: Stored | None = None) -> None:
        """Fits that belong together, numbered from `first`; the first goes on from `stored` if that is one.

        They are called with `resume=`. Where one is stopped, those after it wait for `resume()`.
        """
        for i, phase in enumerate(phases):
            self._phase = first + i
            try:
                phase(resume=None if i else stored)
            except BaseException:
                self._rest = self._point, self._phase, phases[i + 1 :]
                raise
            finally:
                self._phase = 0

    def freeze_to(self, n: int) -> None:
        """Freezes the parameter groups before `n` (from the end if negative), and forgets the optimizer's state."""
        if self.opt is None:
            self.create_opt()
        self.opt.freeze_to(n)
        self.opt.clear_state()

    def freeze(self) -> None:
        """Freezes all parameter groups but the last."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Lets every parameter group be trained."""
        self.freeze_to(0)

    def lr_find(
        self,
        start_lr: Any = 1e-7,  # a number, or one per group
        end_lr: Any = 10,
        num_it: int = 100,  # batches; at least 6 are made
        stop_div: bool = True,  # end where the loss diverges or is not a number
        show_plot: bool = True,
        suggest_funcs: Any = (SuggestionMethod.Valley,),  # functions (lrs, losses, num_it) -> (lr, (lr, loss))
    ) -> Any:
        """Trains a little with a growing rate, undoes it, and returns suggested rates, a named tuple; None without any.

        Until the next fit `recorder.lrs`, `losses` and `hps` show that pass; nothing else of it stays, but for an
        optimizer where there was none. Ctrl-C ends it at once. Rates of several groups are suggested for the last.
        """
        rules = rules_by_name(suggest_funcs)
        if "recorder" not in self.__dict__:
            raise RuntimeError("`lr_find` reads the losses from the Recorder: `learn.add_cb(Recorder())`.")
        finder = LRFinder(start_lr, end_lr, num_it, stop_div)
        with self.no_logging(), self.no_mbar():
            call = FitCall(None, cbs=finder, n_step=finder.num_it).checked(self, "lr_find")
            kept = run_trial(self, "lr_find", call)
        self.recorder._show((kept, finder.hps))
        found: dict[str, Any] = {}
        try:
            found = suggested(rules, self.recorder.lrs, self.recorder.losses, finder.num_it) if rules else {}
        finally:  # the picture shows why there is no suggestion
            if show_plot:
                self.recorder.plot_lr_find(suggestions=[point for _, point in found.values()], nms=list(found))
        return _suggestion(found) if found else None

    def create_opt(self) -> None:
        """Makes the optimizer from `opt_func`, `splitter` and `lr`, and flags biases and normalization layers."""
        rate = getattr(self.opt_func, "keywords", {}).get("lr")
        if isinstance(self.opt_func, partial) and rate is not None:
            self.lr = rate
        self.opt = self._made_opt()
        for p in () if self.wd_bn_bias else norm_bias_params(self.model):
            self.opt.state[p]["do_wd"] = False
        for p in norm_bias_params(self.model, with_bias=False) if self.train_bn else ():
            self.opt.state[p]["force_train"] = True

    def _made_opt(self) -> Any:
        if isinstance(self.opt_func, OptimWrapper):
            self.opt_func.clear_state()
            return self.opt_func
        groups = with_names(self.splitter(self.model), self.model)
        if not any(True for group in groups for _ in (group if _is_list(group) else [group])):
            return NothingToTrain(lr=self.lr)
        if _is_of_torch(self.opt_func):
            return OptimWrapper(groups, opt=self.opt_func, lr=self.lr)
        return self.opt_func(groups, lr=self.lr)

    def _prepare_opt(self, call: FitCall, is_resumed: bool) -> None:
        """The optimizer and its hypers for a fit; a resumed one keeps what it has."""
        if self.opt is None or (call.reset_opt and not is_resumed):
            self.create_opt()
        if not is_resumed:
            hypers = {"lr": self.opt.or_own("lr", self.lr) if call.lr is None else call.lr}
            if call.wd is not None or self.wd is not None:
                hypers["wd"] = self.opt.or_own("wd", self.wd) if call.wd is None else call.wd
            self.opt.set_hypers(**hypers)

    # Looking at a model without training it

    def validate(
        self,
        ds_idx: int | str = 1,  # which loader of `dls`, by number or name
        dl: Any = None,  # another loader
        cbs: Any = None,  # callbacks for this run only
    ) -> Any:
        """Loss and metrics on a loader, an `L`; moves nothing of the training: counters, record, modes, randomness.

        A metric that is `on="train"` is left out.
        """
        loader = self._loader(ds_idx) if dl is None else dl
        if loader is None:
            raise ValueError("there is no validation loader: pass one to DataLoaders, or `validate(dl=…)`.")

        records: list[Any] = []

        def body() -> None:
            self._do_epoch_validate(ds_idx, dl)
            records.append(self.__dict__.get("final_record"))

        with self.no_logging(), self.no_mbar():
            self._run_beside("validate", cbs, body)
        return records[0] if records else None

    def get_preds(
        self,
        ds_idx: Any = 1,  # which loader of `dls`, read once without shuffling or dropping anything
        dl: Any = None,  # another loader, or a list of batches
        with_input: bool = False,
        with_decoded: bool = False,  # what `loss_func.decodes` makes of the predictions, such as classes
        with_loss: bool = False,  # one number per sample
        act: Callable[[Any], Any] | None = None,  # applied to the model's outputs; None: `loss_func.activation`
        inner: bool = False,  # no fit and epoch around it; inside a run there are none anyway
        reorder: bool = True,  # in the order of the dataset; False: in that of the loader
        cbs: Any = None,  # callbacks for this run only
        **kwargs: Any,  # of GatherPredsCallback: save_preds save_targs with_preds with_targs concat_dim
    ) -> tuple[Any, ...]:
        """Predictions and targets, in host memory: `([inputs], preds, targets, [decoded], [losses])`.

        To stream to disk, `get_preds(save_preds=folder, with_preds=False, with_targs=False)`: a file per batch, of what
        the model gave before `act`, and None in place of what is not kept. Moves nothing of the training. Batches that
        cannot be joined, as those of different lengths, come as an `L` of samples.
        """
        loader = self._loader(ds_idx) if dl is None else dl
        if loader is None:
            raise ValueError("there is no validation loader: pass one to DataLoaders, or `get_preds(dl=…)`.")
        self._check_wanted(with_loss, with_decoded, kwargs.get("with_preds", True))
        gather = GatherPredsCallback(with_input, with_loss, **kwargs)
        orders: list[Any] = []

        def body() -> None:
            once_each, order = once(loader, in_order=reorder)
            orders.append(order)
            self._do_epoch_validate(dl=once_each)

        with self.no_logging(), self.no_mbar(), self.loss_not_reduced() if with_loss else nullcontext():
            self._run_beside("predict", [*listed(cbs), gather], body, spans=not inner)
        parts = {"inputs": gather.inputs, "preds": gather.preds, "targets": gather.targets, "losses": gather.losses}
        if reorder and orders and orders[0] is not None:
            indices = [i for n in gather.batches for i in orders[0][n]]
            parts = {
                k: in_dataset_order(v, indices, 0 if k == "losses" else gather.concat_dim) for k, v in parts.items()
            }
        return self._finished(parts, act, with_input, with_decoded, with_loss)

    def _check_wanted(self, with_loss: bool, with_decoded: bool, with_preds: bool) -> None:
        if with_loss and self.loss_func is None:
            raise ValueError("`with_loss` needs a loss per sample, but `loss_func` is None: the model reduces its own.")
        if with_decoded and not with_preds:
            raise ValueError("`with_decoded` decodes what is kept; leave out `with_preds=False`.")

    def _finished(self, parts: dict[str, Any], act: Any, with_input: bool, with_decoded: bool, with_loss: bool) -> Any:
        preds = parts["preds"]
        act = getattr(self.loss_func, "activation", noop) if act is None else act
        preds = None if preds is None else act(preds)
        found = [parts["inputs"]] if with_input else []
        found += [preds, parts["targets"]]
        if with_decoded:
            found.append(None if preds is None else getattr(self.loss_func, "decodes", noop)(preds))
        return tuple([*found, parts["losses"]] if with_loss else found)

    def tta(
        self,
        ds_idx: Any = 1,  # which loader of `dls`, read as by `get_preds`
        dl: Any = None,  # another loader, or a list of batches
        n: int = 4,  # augmented passes
        item_tfms: Any = None,  # functions of one sample's input, run before `batch_tfms`
        batch_tfms: Any = None,  # functions of a batch, as of BatchTransform; None: what the training augments with
        beta: float | None = 0.25,  # weight of the predictions without augmentation; None: both, as a tuple
        use_max: bool = False,  # the largest of all predictions, not a mean
    ) -> tuple[Any, Any]:
        """Predictions from augmented inputs and from plain ones, averaged, and the targets: test time augmentation.

        `(1 - beta) * mean(augmented) + beta * plain`, after `loss_func.activation`. Every pass draws numbers of its
        own; the training's are left alone, so that two calls give the same.
        """
        if n < 1:
            raise ValueError(f"`n={n}`: pass a number of augmented passes, 1 or more; `get_preds` makes none.")
        if isinstance(dl, Iterator):
            raise TypeError("`tta` reads its loader several times, and `dl` is an iterator; pass `list(dl)`.")
        augmented = []
        with preserved_randomness(), augmenting(self.cbs, listed(item_tfms), listed(batch_tfms)) as cbs:
            for _ in range(n):
                set_seed(draw_seed())  # each run puts the generators back
                augmented.append(self.get_preds(ds_idx, dl, cbs=cbs)[0])
        preds, targets = self.get_preds(ds_idx, dl)
        return blended_preds(augmented, preds, beta, use_max), targets

    def predict(
        self,
        item: Any,  # one sample's input, as the dataset gives it; a tuple of several inputs, or a mapping
        with_input: bool = False,
    ) -> tuple[Any, ...]:
        """The prediction for one item: `([input], label, decoded, pred)`; the label is read from `dls.vocab` if any."""
        batch = one_item_batch(self.dls, item)
        with self.no_bar():
            inputs, preds, _, decoded = self.get_preds(dl=batch, with_input=True, with_decoded=True)
        found = first_sample(decoded), first_sample(preds)
        label = label_of(getattr(self.dls, "vocab", None), found[0])
        return (first_sample(inputs), label, *found) if with_input else (label, *found)

    def loss_not_reduced(self) -> AbstractContextManager[Any]:
        """A context in which `loss_func` gives one value per target, not their mean."""
        return unreduced(self.loss_func, partial(setattr, self, "loss_func"))

    def _run_beside(self, task: str, cbs: Any, body: Callable[[], Any], spans: bool = True) -> None:
        def seeded() -> None:
            self.__dict__.pop("final_record", None)
            self._data_seed = draw_seed()
            body()

        run_beside(self, task, cbs, seeded, spans)

    def __enter__(self) -> "Learner":
        """Enters the fit and epoch spans by hand: `with learn: …`."""
        if self.task is not None:
            raise RuntimeError("`with learn:` was entered while a run is active; call what is inside directly.")
        self.task = "validate"
        try:
            self._rebuild()
            enter_span(self, FIT)
            try:
                enter_span(self, EPOCH)
            except BaseException as error:
                self._leave(error, (FIT,))
                raise
        except BaseException:
            end_run(self, [])
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        """Leaves both spans, with their cancels in scope; an error fires cleanups only."""
        try:
            self._leave(error, (FIT, EPOCH))
        except BaseException as left:
            if left is error:
                return False
            raise
        finally:
            end_run(self, [])
        return True

    def _leave(self, error: BaseException | None, spans: tuple[Any, ...]) -> None:
        def body() -> None:
            if error is not None:
                raise error

        if len(spans) > 1:
            run_span(self, spans[0], lambda: self._leave(error, spans[1:]), entered=True)
        else:
            run_span(self, spans[0], body, entered=True)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything a run is, as plain data in host memory: weights, optimizer, counters, callbacks, position."""
        return capture_or_point(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned; one that does not fit is refused before anything changes.

        `resume()` then goes on from its position; a plain `fit` starts at batch 0.
        """
        if self.task is not None:
            raise RuntimeError("`load_state_dict` was called while a run is active; load before the fit.")
        former = self.opt
        try:
            if former is None and isinstance(state, dict) and state.get("opt") is not None:
                self.create_opt()
            restore(self, state)
        except ValueError:
            self.opt = former
            raise
        self._point, self._call = state if state["counters"] else None, None

    # Files

    def save(
        self,
        file: str | Path,  # `.pth` is added; below `path`/`model_dir` unless absolute
        with_opt: bool = True,  # the optimizer's state too, if there is an optimizer
    ) -> Path:
        """Writes the weights to a file, whole or not at all, and returns its path.

        An OSError names path and reason, a TypeError what cannot be stored; an earlier file is then as it was.
        """
        path = weights_path(self, file)
        save_model(path, self.model, self.opt, with_opt)
        return path

    def load(
        self,
        file: str | Path,  # of `save`; or one that ends in `.safetensors`, below `path`, where `export` puts it
        device: Any = None,  # where tensors are put while they are read; None: host memory
        with_opt: bool | None = None,  # True: the optimizer's state must be there and fit; None: if so, else warn
        strict: bool = True,  # False: names that only one side has are left out
    ) -> "Learner":
        """Reads weights and optimizer state into the learner, and returns it. No code of the file is run.

        Averages of the weights begin anew. FileNotFoundError, `FileDamaged`, or a ValueError that says what does not
        fit; then nothing has changed.
        """
        path, former = weights_path(self, file), self.opt
        try:
            if former is None and with_opt is not False and path.suffix != SAFETENSORS:
                self.create_opt()
            has_opt = load_model(path, self.model, self.opt, with_opt, device, strict)
        except BaseException:
            self.opt = former
            raise
        for cb in self.cbs:
            cb.weights_loaded(has_opt)
        return self

    def export(
        self,
        fname: str | Path | None = None,  # below `path`; None: `export` with the ending of the format
        format: str | None = None,  # 'pickle', 'safetensors' or 'pt2'; None: by the ending, else 'pickle'
        example: Any = None,  # for pt2, a batch as the loaders give it; None: the first one for training
        pickle_module: Any = None,  # None: cloudpickle where it is installed, else pickle
        pickle_protocol: int = 2,
    ) -> Path:
        """Writes the learner without its data to a file, whole or not at all, and returns its path.

        `pickle`: the learner with empty loaders and without an optimizer, for `load_learner(…, trusted=True)`.
        `safetensors`: weights and a description in strings of JSON, for `learn.load`, which cannot run code.
        `pt2`: the model in eval mode as a program for batches of any size, read by `torch.export.load` without any of
        our code. From a file written here that unpickles nothing, but it would what a forged one holds.
        TypeError that names what cannot be stored. The learner stays as it is.
        """
        return export(self, fname, format, example, pickle_module, pickle_protocol)

    # Precision

    def to_fp16(self, **kwargs: Any) -> "Learner":
        """Trains in float16 mixed precision; `kwargs` of `MixedPrecision`: init_scale, growth_interval, …"""
        return self.to_fp32().add_cb(MixedPrecision("fp16", **kwargs))

    def to_bf16(self) -> "Learner":
        """Trains in bfloat16 mixed precision."""
        return self.to_fp32().add_cb(MixedPrecision("bf16"))

    def to_fp32(self) -> "Learner":
        """Trains in float32 again."""
        return self.remove_cb(MixedPrecision)

    # Execution

    def to_channelslast(self, use_amp: bool = True, amp_mode: Any = "fp16", **kwargs: Any) -> "Learner":
        """Keeps weights of images' layers with channels last in memory, unless `use_amp=False` in mixed precision.

        `kwargs` are those of `MixedPrecision`; one that is there already stays.
        """
        if not self._grab_cbs(ChannelsLast):
            self.add_cb(ChannelsLast())
        if use_amp and not self._grab_cbs(MixedPrecision):
            self.add_cb(MixedPrecision(amp_mode, **kwargs))
        return self

    def to_contiguous(self, to_fp32: bool = False) -> "Learner":
        """Keeps weights in torch's usual order again; with `to_fp32` trains in float32 again, too."""
        self.model.to(memory_format=torch.contiguous_format)
        return self.remove_cbs([ChannelsLast, MixedPrecision] if to_fp32 else ChannelsLast)

    # Showing

    def summary(self, batch: Any = None) -> ModelSummary:
        """The model layer by layer: shapes, parameters, groups, memory, multiply-adds; text in a terminal, else HTML.

        From one batch as the loaders give it (default: the first one for training) in eval mode, with the callbacks.
        Nothing of the learner moves. `.layers`, `.n_params`, `.n_macs` and the rest are there as numbers.
        """
        return summarize(self, batch)

    def show_batch(self, ds_idx: int | str = 0, dl: Any = None, max_n: int = 9, **kwargs: Any) -> Any:
        """Draws the first samples of a loader with their targets; `kwargs`: cols, figsize. Returns the figure.

        Images have the shape (c, h, w) or (h, w), vectors are lines, anything else is text; `dls.vocab` names classes.
        """
        return show_batch(self, ds_idx, dl, max_n, **kwargs)

    def show_results(self, ds_idx: int | str = 1, dl: Any = None, max_n: int = 9, **kwargs: Any) -> Any:
        """Draws the first samples of a loader with targets and predictions; else like `show_batch`."""
        return show_results(self, ds_idx, dl, max_n, **kwargs)

    def dry_run(
        self,
        n_epoch: int = 1,  # of the fit that is meant
        cbs: Any = None,  # callbacks for that fit only
        *,
        n_step: int | None = None,  # updates that it would make, instead of `n_epoch`
        **kwargs: Any,  # of `fit`: lr wd reset_opt start_epoch valid_every
    ) -> DryRun:
        """Which callbacks would hear each event of a fit, in which order and why, what each writes, what conflicts.

        The first and the last epoch are run with two batches in each phase, and undone to the bit. Callbacks with
        `acts_outside` are listed and not called. `.rows`, `.writes`, `.conflicts` and `.explain(event)` are there too.
        """
        n_epoch_or_none = n_epoch if n_step is None else None
        return self.fit(n_epoch_or_none, cbs=cbs, n_step=n_step, dry_run=True, **kwargs)  # type: ignore[return-value]

    def explain(self, event: str, cbs: Any = None) -> Text:
        """One event in sentences, from a dry run: who hears it, in which order and why, what each writes, cancels."""
        return self.dry_run(cbs=cbs).explain(event)

    def show_training_loop(self) -> None:
        """Prints every event in firing order with the callbacks that hear it, in their order; `dry_run` tells more."""
        print(outline(self.cbs))

    @contextmanager
    def no_bar(self) -> Iterator["Learner"]:
        """A context without the progress bar and its table."""
        with self.removed_cbs(ProgressCallback):
            yield self

    @contextmanager
    def no_mbar(self) -> Iterator["Learner"]:
        """A context in which no bar over the epochs is made."""
        with _replaced(self, "create_mbar", False):
            yield self

    @contextmanager
    def no_logging(self) -> Iterator["Learner"]:
        """A context in which rows are shown nowhere."""
        with _replaced(self, "logger", noop):
            yield self

    def to_detach(self, batch: Any, cpu: bool = True) -> Any:
        """The batch without graphs, in host memory if `cpu`."""
        return to_detach(batch, cpu)

    def __repr__(self) -> str:
        return f"Learner({type(self.model).__name__}, {self.dls!r}, cbs={list(self.cbs)})"

    def _repr_html_(self) -> str:
        """What it is made of, and the last row of its training, as a table."""
        n, trained = total_params(self.model) if isinstance(self.model, nn.Module) else (0, False)
        recorder = self.__dict__.get("recorder")
        row = recorder.history[-1] if recorder is not None and recorder.history else {}
        rows = [
            ("model", f"{type(self.model).__name__}, {n:,} parameters{'' if trained or not n else ', none trained'}"),
            ("data", repr(self.dls)),
            ("loss", getattr(self.loss_func, "__name__", None) or repr(self.loss_func)),
            ("optimizer", repr(self.opt).split("\n")[0] if self.opt is not None else "made at the first fit"),
            ("metrics", ", ".join(m.name for m in self.metrics)),
            ("callbacks", ", ".join(map(repr, self.cbs))),
            ("last epoch", ", ".join(f"{k} {v:.6f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())),
        ]
        return html.table([row for row in rows if row[1]], caption="Learner")


def before_batch_cb(function: Callable[..., tuple[Any, Any]]) -> Callback:
    """A callback from a function `(cb, xb, yb) -> (xb, yb)` that runs before each batch."""

    def before_batch(cb: Callback) -> None:
        cb.learn.xb, cb.learn.yb = function(cb, cb.xb, cb.yb)

    return Callback(before_batch=before_batch)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    former = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, former)


def _check_parts(dls: Any, model: Any, loss_func: Any) -> None:
    if not hasattr(dls, "train"):
        raise TypeError(
            f"`dls` is a {type(dls).__name__}; put the loaders together first: `DataLoaders(train, valid)`."
        )
    if not callable(model):
        raise TypeError(f"`model` is a {type(model).__name__}, which cannot be called; pass a module or a function.")
    if isinstance(loss_func, type):
        raise TypeError(f"`loss_func` is the class {loss_func.__name__}; pass an instance: `{loss_func.__name__}()`.")
    if loss_func is not None and not callable(loss_func):
        raise TypeError(f"`loss_func` is a {type(loss_func).__name__}, which cannot be called.")


def _loss_of(dls: Any) -> Any:
    """The loss that the data brings along, as fastai's datasets do; None where it brings none."""
    dataset = getattr(dls.train, "dataset", None)
    return getattr(dls, "loss_func", None) or getattr(dataset, "loss_func", None)


def _is_of_torch(opt_func: Any) -> bool:
    cls = opt_func.func if isinstance(opt_func, partial) else opt_func
    return isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)


def _is_list(thing: Any) -> bool:
    return isinstance(thing, (list, tuple, L)) or (hasattr(thing, "__iter__") and not isinstance(thing, torch.Tensor))


def _suggestion(found: dict[str, Any]) -> Any:
    return namedtuple("SuggestedLRs", list(found))(*(lr for lr, _ in found.values()))


class _Missing:
    """The text of an AttributeError, made only when somebody reads it: `hasattr` asks often and reads never."""

    def __init__(self, name: str, learn: Any, model: Any):
        self.name, self.learn, self.model = name, learn, model

    def __str__(self) -> str:
        model = f" nor on the model `{type(self.model).__name__}`" if self.model is not None else ""
        return f"`{self.name}` is neither on the learner{model}.{nearest(self.name, self.learn, self.model)}"

    __repr__ = __str__

    def __reduce__(self) -> Any:
        return str, (str(self),)
