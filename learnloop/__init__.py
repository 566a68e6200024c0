"""A training loop of events and ordered callbacks for PyTorch: `import learnloop as ll`."""

from learnloop.callbacks.modes import TrainEvalCallback
from learnloop.callbacks.progress import ProgressCallback
from learnloop.callbacks.recorder import Recorder
from learnloop.callbacks.schedule import ParamScheduler, SkipToEpoch
from learnloop.data import datasets
from learnloop.data.loaders import DataLoaders, TensorLoader
from learnloop.learner import Learner, before_batch_cb, defaults
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import (
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from learnloop.loop.events import event
from learnloop.loop.ordering import OrderingError
from learnloop.losses import (
    BaseLoss,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLoss,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
    NoneReduce,
    reduce_loss,
    unreduced,
)
from learnloop.metrics import (
    AvgLoss,
    AvgMetric,
    AvgSmoothLoss,
    Metric,
    ValueMetric,
    accuracy,
    error_rate,
    mk_metric,
)
from learnloop.optim.algorithms import SGD, Adam
from learnloop.optim.groups import norm_bias_params, params, trainable_params
from learnloop.optim.optimizer import Optimizer
from learnloop.optim.schedules import (
    SchedCos,
    SchedExp,
    SchedLin,
    SchedNo,
    SchedPoly,
    annealer,
    combine_scheds,
    combined_cos,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from learnloop.optim.wrapper import OptimWrapper

__all__ = [
    "SGD",
    "Adam",
    "AvgLoss",
    "AvgMetric",
    "AvgSmoothLoss",
    "BCELossFlat",
    "BCEWithLogitsLossFlat",
    "BaseLoss",
    "Callback",
    "CancelBackwardException",
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelFitException",
    "CancelStepException",
    "CancelTrainException",
    "CancelValidException",
    "CrossEntropyLossFlat",
    "DataLoaders",
    "DiceLoss",
    "FocalLoss",
    "FocalLossFlat",
    "L1LossFlat",
    "LabelSmoothingCrossEntropy",
    "LabelSmoothingCrossEntropyFlat",
    "Learner",
    "MSELossFlat",
    "Metric",
    "NoneReduce",
    "OptimWrapper",
    "Optimizer",
    "OrderingError",
    "ParamScheduler",
    "ProgressCallback",
    "Recorder",
    "SchedCos",
    "SchedExp",
    "SchedLin",
    "SchedNo",
    "SchedPoly",
    "SkipToEpoch",
    "TensorLoader",
    "TrainEvalCallback",
    "ValueMetric",
    "accuracy",
    "annealer",
    "before_batch_cb",
    "combine_scheds",
    "combined_cos",
    "datasets",
    "defaults",
    "error_rate",
    "event",
    "mk_metric",
    "norm_bias_params",
    "params",
    "reduce_loss",
    "sched_cos",
    "sched_exp",
    "sched_lin",
    "sched_no",
    "trainable_params",
    "unreduced",
]
