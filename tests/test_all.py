"""What `from learnloop.all import *` brings: every public name, and what fastai's own star import would bring."""

import subprocess
import sys
from pathlib import Path

import fastcore.basics
import pytest
import torch

import learnloop as ll
import learnloop.all as star

#: Names of fastai 2.8 that callbacks and training scripts use, by what they belong to.
FASTAI = {
    "core": """Callback TrainEvalCallback GatherPredsCallback FetchPredsCallback CollectDataCallback event DataLoaders
        CancelBatchException CancelTrainException CancelValidException CancelEpochException CancelFitException
        CancelStepException CancelBackwardException defaults""",
    "learner": """Learner Recorder Metric AvgMetric AvgLoss AvgSmoothLoss ValueMetric SkipToEpoch before_batch_cb
        load_learner load_model save_model mk_metric""",
    "schedules": """ParamScheduler LRFinder SchedLin SchedCos SchedNo SchedExp SchedPoly sched_lin sched_cos sched_no
        sched_exp annealer combine_scheds combined_cos valley slide minimum steep SuggestionMethod""",
    "trackers and training": """TrackerCallback EarlyStoppingCallback SaveModelCallback ReduceLROnPlateau
        TerminateOnNaNCallback GradientAccumulation GradientClip ShortEpochCallback BnFreeze set_bn_eval bn_types
        MCDropoutCallback MixedPrecision AMPMode""",
    "progress, recurrent networks, mixing": """ProgressCallback CSVLogger ShowGraphCallback ModelResetter RNNCallback
        RNNRegularizer rnn_cbs MixUp CutMix MixHandler reduce_loss NoneReduce""",
    "hooks": """Hook Hooks hook_output hook_outputs HookCallback ActivationStats layer_info model_sizes
        num_features_model has_params total_params""",
    "optimizers": """Optimizer OptimWrapper SGD RMSProp Adam RAdam QHAdam Larc Lamb Lookahead ranger sgd_step
        momentum_step weight_decay l2_reg average_grad average_sqr_grad step_stat adam_step debias""",
    "losses": """BaseLoss CrossEntropyLossFlat BCEWithLogitsLossFlat BCELossFlat MSELossFlat L1LossFlat
        LabelSmoothingCrossEntropy LabelSmoothingCrossEntropyFlat FocalLoss FocalLossFlat DiceLoss""",
    "metrics": """accuracy error_rate top_k_accuracy accuracy_multi mse mae msle rmse exp_rmspe foreground_acc
        optim_metric skm_to_fastai AccumMetric LossMetric LossMetrics Perplexity CorpusBLEUMetric Dice DiceMulti
        JaccardCoeff JaccardCoeffMulti F1Score FBeta Precision Recall Jaccard HammingLoss RocAuc APScoreMulti
        F1ScoreMulti FBetaMulti PrecisionMulti RecallMulti JaccardMulti HammingLossMulti RocAucMulti RocAucBinary
        APScoreBinary BalancedAccuracy CohenKappa MatthewsCorrCoef R2Score ExplainedVariance PearsonCorrCoef
        SpearmanCorrCoef BrierScore""",
    "helpers": """L store_attr patch delegates Module noop ifnone first tuplify detuplify is_listy range_of camel2snake
        even_mults tensor to_device to_detach to_float to_half to_cpu to_np to_concat unsqueeze find_bs flatten_check
        flatten_model params trainable_params norm_bias_params bn_bias_params get_model default_device set_seed
        one_param rank_distrib num_distrib listify ismin_torch notmax_torch join_path_file Tensor TensorBase""",
    "python and torch": """Any Callable F Optional Path contextmanager copy deepcopy defaultdict json math nn np os
        partial plt random re time torch warn warnings""",
}
NAMES = {name for names in FASTAI.values() for name in names.split()}
METHODS = {
    ll.Learner: """fit fit_one_cycle fit_flat_cos fit_sgdr fine_tune lr_find save load export freeze unfreeze freeze_to
        to_fp16 to_bf16 to_fp32 to_channelslast to_contiguous no_bar no_mbar no_logging loss_not_reduced
        summary""",
    ll.Recorder: "plot_loss plot_sched plot_lr_find",
}


def test_every_name_of_fastai_is_there():
    assert NAMES - {*star.__all__} == set()


def test_every_method_of_fastai_is_there():
    missing = {name for cls, names in METHODS.items() for name in names.split() if not hasattr(cls, name)}
    assert missing == set()


def test_every_public_name_is_there():
    assert {name: getattr(star, name) for name in ll.__all__} == {name: getattr(ll, name) for name in ll.__all__}
    assert {*ll.__all__} <= {*star.__all__}


def test_no_name_hides_one_of_ours():
    assert star.tensor is not torch.tensor
    assert star.event is ll.event and star.even_mults is not fastcore.basics.even_mults


def test_callbacks_that_ask_for_tensor_base_meet_every_tensor():
    assert isinstance(torch.ones(1), star.TensorBase)
    assert torch.ones(1).as_subclass(star.TensorBase).add(1) == 2


@pytest.mark.parametrize("name", ["learnloop", "fastcore"])
def test_no_package_comes_along_under_its_own_name(name):
    assert name not in star.__all__


def test_a_star_import_brings_these_names_and_no_other():
    code = "before = {*dir()}; from learnloop.all import *; print(*sorted({*dir()} - before - {'before'}))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(star.__all__)
