"""Callbacks as people write them for fastai, each in a small training, and the numbers that come out.

make_wild_numbers.py runs this file with fastai, tests/test_wild_callbacks.py with the two import lines changed.
"""
# ruff: noqa: F403, F405

from dataclasses import dataclass, field
from types import SimpleNamespace

from fastai.basics import *
from fastai.callback.all import *


def grid(*shape, shift=0.0):
    """Well spread numbers in (-1, 1), no random generator involved."""
    return torch.sin(1.9 * (0.7 * torch.arange(math.prod(shape), dtype=torch.float32) + 0.3 + shift)).reshape(*shape)


X, Y = grid(24, 4), (2 * torch.arange(24) + 1) % 3
X_VALID, Y_VALID = grid(9, 4, shift=0.4), torch.arange(9) % 3


def net():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    for i, p in enumerate(model.parameters()):
        p.data = grid(*p.shape, shift=i)
    return model


# Callbacks that change the batch


class HardestSamples(Callback):
    """Trains on the samples of a batch with the highest loss."""

    run_valid = False

    def __init__(self, part=0.5):
        store_attr()

    def before_fit(self):
        self.run = not hasattr(self, "gather_preds")
        self.crit = self.learn.loss_func
        self.red = self.crit.reduction if hasattr(self.crit, "reduction") else None

    def before_batch(self):
        with torch.no_grad():
            if self.red:
                self.crit.reduction = "none"
            losses = self.crit(self.model(self.x), self.y)
            if self.red:
                self.crit.reduction = self.red
        idxs = torch.argsort(losses, descending=True, stable=True)[: int(self.part * find_bs(self.xb))]
        self.learn.xb = tuple(x[idxs] for x in self.xb)
        self.learn.yb = tuple(y[idxs] for y in self.yb)


class Denoise(Callback):
    """Self-supervised: the inputs are the targets, with another loss function for this fit."""

    order = 9

    def __init__(self, keep=3):
        store_attr()

    def before_fit(self):
        self.old_lf = self.learn.loss_func
        self.learn.loss_func = self.lf
        self.old_met, self.learn.metrics = self.learn.metrics, L()

    def before_batch(self):
        x = self.x.clone()
        x[:, self.keep :] = 0
        self.learn.yb = self.xb
        self.learn.xb = (x,)

    def lf(self, pred, *yb):
        return F.mse_loss(pred, yb[0][:, : pred.shape[1]])

    def after_fit(self):
        self.learn.loss_func, self.learn.metrics = self.old_lf, self.old_met


# Callbacks that change prediction and loss


class Penalty(Callback):
    """Adds to the loss in place."""

    def __init__(self, alpha=0.1):
        self.alpha = alpha

    def after_loss(self):
        if not self.training:
            return
        extra = self.alpha * sum(p.pow(2).sum() for p in trainable_params(self.model) if p.ndim > 1)
        self.learn.loss_grad += extra
        self.learn.loss += extra.clone()


class Distill(Callback):
    """A frozen copy of the first model teaches the later ones."""

    def __init__(self, weight=0.5, T=2.0):
        store_attr()

    def before_fit(self):
        self.teacher = deepcopy(self.learn.model).eval()
        for p in params(self.teacher):
            p.requires_grad_(False)

    def after_loss(self):
        if not self.training:
            return
        theirs = self.teacher(*self.xb)
        kd = F.kl_div(F.log_softmax(self.pred / self.T, 1), F.softmax(theirs / self.T, 1), reduction="batchmean")
        self.learn.loss_grad = (1 - self.weight) * self.learn.loss_grad + self.weight * kd
        self.learn.loss = self.loss_grad.clone()


class Detector(Module):
    """Like torchvision's: a dict of losses in training, predictions else."""

    def __init__(self):
        self.body = net()

    def forward(self, x, y=None):
        out = self.body(x)
        return {"classes": F.cross_entropy(out, y), "size": out.pow(2).mean()} if self.training else out


class DetectorAdapter(Callback):
    """Hands the targets to the model, and leaves `yb` empty so that no loss is computed."""

    def after_create(self):
        self.learn.save_yb = []

    def before_batch(self):
        self.learn.save_yb = self.learn.yb
        if self.training:
            self.learn.xb = [self.x, *self.learn.yb]
            self.learn.yb = []

    def after_pred(self):
        if self.training:
            self.learn.loss_grad = sum(loss for loss in self.learn.pred.values())
            self.learn.loss = self.learn.loss_grad.clone()

    def after_loss(self):
        self.learn.yb = self.learn.save_yb


class WithLogits(Module):
    """Like a transformer: an object with logits and a loss."""

    def __init__(self):
        self.body = net()

    def forward(self, x):
        logits = self.body(x)
        return SimpleNamespace(logits=logits, loss=logits.pow(2).mean())


class TransformerAdapter(Callback):
    """Takes loss and logits out of the model's output."""

    def after_pred(self):
        self.model_loss = self.pred.loss
        self.learn.pred = self.pred.logits

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.model_loss + self.loss_grad
            self.learn.loss = self.loss_grad.clone()


class NaNGuard(Callback):
    """Cancels batches whose loss is no number, with a loss of 0 for the record; three in a row end the fit."""

    def before_fit(self):
        self.n_skipped, self.in_a_row = 0, 0

    def after_pred(self):
        if self.training and self.train_iter % 4 == 1:
            self.learn.pred = self.pred * float("nan")

    def after_loss(self):
        if not self.training:
            return
        if not torch.isfinite(self.loss):
            self.n_skipped, self.in_a_row = self.n_skipped + 1, self.in_a_row + 1
            if self.in_a_row == 3:
                raise CancelFitException("the training diverged")
            self.learn.loss = self.learn.loss_grad = torch.zeros_like(self.loss)
            raise CancelBatchException
        self.in_a_row = 0

    @property
    def seen(self):
        return [self.n_skipped]


# Callbacks that change gradients, steps and weights


class SharpnessAware(Callback):
    """Steps with the gradient at the point where the loss is highest near by."""

    def __init__(self, rho=0.05):
        store_attr()

    def before_step(self):
        grads = [(p, p.grad.clone()) for p, *_ in self.opt.all_params(with_grad=True)]
        scale = self.rho / (torch.stack([g.norm() for _, g in grads]).norm() + 1e-12)
        with torch.no_grad():
            for p, g in grads:
                p.add_(g, alpha=scale.item())
        self.opt.zero_grad()
        self.learn.pred = self.model(*self.xb)
        self.learn("after_pred")
        self.loss_func(self.learn.pred, *self.yb).backward()
        with torch.no_grad():
            for p, g in grads:
                p.sub_(g, alpha=scale.item())


class Accumulate(Callback):
    """Steps once for `n_acc` samples."""

    order, run_valid = TrainEvalCallback.order + 6, False

    def __init__(self, n_acc=12):
        store_attr()

    def before_fit(self):
        self.count = 0

    def after_loss(self):
        self.learn.loss_grad /= self.n_acc / find_bs(self.learn.yb)

    def before_step(self):
        self.count += find_bs(self.learn.yb)
        if self.count < self.n_acc:
            raise CancelBatchException()
        self.count = 0


class HandScaler(Callback):
    """Mixed precision's scaler with the callback in the place of an optimizer."""

    order = 10

    def before_fit(self):
        self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2), L()

    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)
        if self.train_iter == 3:
            self.learn.loss_grad = self.learn.loss_grad * float("inf")

    def before_step(self):
        self.skipped = True
        self.scaler.step(self)
        if self.skipped:
            raise CancelStepException()
        self.scales.append(self.scaler.get_scale())

    def after_step(self):
        self.learn.scaler.update()

    @property
    def param_groups(self):
        return self.opt.param_groups

    def step(self, *args, **kwargs):
        self.skipped = False

    @property
    def seen(self):
        return list(self.scales)


class MovingAverage(Callback):
    """Validates an average of the weights, which is the model in the end."""

    order, run_before = 5, Recorder

    def __init__(self, decay=0.8):
        store_attr()

    def before_fit(self):
        self.average = deepcopy(self.model)

    @torch.no_grad()
    def after_step(self):
        for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            kept.lerp_(new, 1 - self.decay)

    def before_validate(self):
        self.trained, self.learn.model = self.model, self.average
        self.model.eval()

    def after_validate(self):
        self.learn.model = self.trained

    def after_fit(self):
        self.learn.model.load_state_dict(self.average.state_dict())


class FrozenNorms(Callback):
    """Keeps the statistics of normalization layers, and trains no bias."""

    run_after, run_valid = TrainEvalCallback, False

    def before_fit(self):
        for p in norm_bias_params(self.model):
            p.requires_grad_(False)

    def before_train(self):
        for m in flatten_model(self.model):
            if isinstance(m, nn.BatchNorm1d):
                m.eval()


# Callbacks that steer


class HandSchedule(Callback):
    """Warms up, then halves the rates of all groups when the validation loss does not fall enough."""

    order, run_valid = Recorder.order + 1, False

    def __init__(self, lrs=(0.05, 0.2), warm=0.25, patience=0.2):
        store_attr()
        self.sched = SchedCos(0.1, 1.0)

    def before_fit(self):
        self.factor, self.best = 1.0, math.inf

    def before_batch(self):
        pct = min(1.0, self.pct_train / self.warm)
        self.opt.set_hyper("lr", [self.factor * self.sched(pct) * lr for lr in self.lrs])

    def after_epoch(self):
        i = list(self.recorder.metric_names[1:]).index("valid_loss")
        loss = self.recorder.values[-1][i]
        if loss > self.best - self.patience:
            self.factor /= 2
            if self.opt.hypers[-1]["lr"] < 0.06:
                raise CancelFitException()
        self.best = min(loss, self.best)

    @property
    def seen(self):
        return [self.epoch, self.factor, [h["lr"] for h in self.opt.hypers]]


class ShortEpochs(Callback):
    """Ends each epoch's training early."""

    def after_batch(self):
        if self.training and self.iter + 1 >= self.n_iter // 2:
            raise CancelTrainException


# Callbacks that watch


class Tracker(Callback):
    """As the loggers of tracking services do."""

    order, remove_on_fetch, run_after = Recorder.order + 1, True, Recorder

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self, "gather_preds") and rank_distrib() == 0
        self.sent, self.lines = defaultdict(list), []
        self.old_logger, self.learn.logger = self.logger, self._write_line
        self.sent["data"] = [self.dls.bs, len(self.dls.train), len(self.dls.train_ds), str(self.dls.device)]

    def _write_line(self, log):
        self.lines.append([t for t in log][:-1])
        self.old_logger(log)

    def after_batch(self):
        if self.training:
            self.sent["loss"].append([self.train_iter, self.loss.item(), to_detach(self.smooth_loss.clone()).item()])
            for i, h in enumerate(self.opt.hypers):
                for k in ("lr", "wd"):
                    self.sent[f"{k}_{i}"].append(h[k])
        self.sent["place"].append([self.epoch, self.iter, self.n_iter, len(self.dl), self.pct_train, len(self.x)])

    def after_epoch(self):
        log = {n: v for n, v in zip(self.recorder.metric_names, self.recorder.log, strict=True) if n != "time"}
        self.sent["epoch"].append(log)
        self.sent["metrics"].append([[m.name, to_np(tensor(m.value)).item()] for m in self.learn.metrics])

    def after_fit(self):
        self.learn.logger = self.old_logger

    @property
    def seen(self):
        return [dict(self.sent), self.lines]


class ClassScores(Callback):
    """Brings metrics of its own, computed over the whole validation set."""

    def before_fit(self):
        if not hasattr(self, "kept"):
            self.kept = self.learn.metrics
            own = L(ValueMetric(partial(self.score, c=c), f"recall_{c}") for c in range(3))
            self.learn.metrics = self.learn.metrics + own

    def before_validate(self):
        self.preds, self.targs = [], []

    def after_batch(self):
        if self.training:
            return
        self.preds.append(to_cpu(self.pred).argmax(dim=1))
        self.targs.append(to_cpu(detuplify(self.yb)))

    def score(self, c):
        preds, targs = to_concat(self.preds), to_concat(self.targs)
        return (preds[targs == c] == c).float().mean().item()


# What is run


@dataclass
class Scene:
    cbs: Callable
    model: Callable = net
    n_epoch: int = 2
    options: dict = field(default_factory=dict)
    fit: str = "fit"


def two_groups(model):
    return [params(model[0]), params(model[1:])]


SCENES = {
    "nothing": Scene(lambda: []),
    "hardest samples": Scene(HardestSamples),
    "denoise": Scene(Denoise),
    "penalty": Scene(Penalty),
    "distill": Scene(lambda: [Distill(), Penalty(0.01)]),
    "detector": Scene(DetectorAdapter, Detector),
    "transformer": Scene(TransformerAdapter, WithLogits),
    "nan guard": Scene(NaNGuard),
    "sharpness aware": Scene(SharpnessAware),
    "accumulate": Scene(Accumulate),
    "hand scaler": Scene(HandScaler),
    "moving average": Scene(MovingAverage),
    "frozen norms": Scene(FrozenNorms),
    "hand schedule": Scene(HandSchedule, n_epoch=5, options={"splitter": two_groups}),
    "short epochs": Scene(ShortEpochs),
    "tracker": Scene(Tracker, fit="fit_one_cycle", options={"opt_func": Adam, "splitter": two_groups}),
    "class scores": Scene(ClassScores),
}


def numbers(scene, dls):
    """Losses, rates, rows and weights of a scene's training, and what its first callback saw."""
    cbs = listify(scene.cbs())
    options = {"opt_func": partial(SGD, mom=0.9), "lr": 0.1, "metrics": accuracy, **scene.options}
    learn = Learner(dls, scene.model(), nn.CrossEntropyLoss(), cbs=cbs, **options)
    with learn.no_bar(), learn.no_logging():
        getattr(learn, scene.fit)(scene.n_epoch)
    return {
        "losses": [loss.item() for loss in learn.recorder.losses],
        "lrs": list(learn.recorder.lrs),
        "names": list(learn.recorder.metric_names),
        "values": [list(row) for row in learn.recorder.values],
        "weights": [p.flatten().tolist() for p in learn.model.state_dict().values()],
        "seen": cbs[0].seen if cbs and hasattr(cbs[0], "seen") else None,
    }
