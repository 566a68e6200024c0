"""Which parameters form a group: by name, with names, norm layers and biases."""

import pickle

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import SGD, Adam, by_name
from learnloop.optim.groups import norm_bias_params, params, summary_of, trainable_params, with_names
from learnloop.testing import toy_learner


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.backbone(x))


def learner(**kwargs):
    torch.manual_seed(0)
    return toy_learner(model=Net(), n_train=16, **kwargs)


def names(groups):
    return [group.names for group in groups]


# by name


def test_each_parameter_goes_to_the_first_pattern_that_it_matches():
    assert names(by_name("backbone.0.*", "backbone.*", "*")(Net())) == [
        ["backbone.0.weight", "backbone.0.bias"],
        ["backbone.1.weight", "backbone.1.bias", "backbone.2.weight", "backbone.2.bias"],
        ["head.weight", "head.bias"],
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("backbone.*",), r"2 parameters match no pattern, such as head.weight, head.bias; add a pattern"),
        (("bakbone.*", "*"), r"no parameter is left for the pattern 'bakbone.\*'; did you mean 'backbone.\*'"),
        (("tail.*", "*"), r"the names begin with backbone, head"),
        (("*", "head.*"), r"an earlier pattern has taken all that it matches"),
    ],
)
def test_patterns_that_do_not_fit_the_model_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        by_name(*patterns)(Net())


@pytest.mark.parametrize("patterns", [(), (3,), ({"head.*": 0.1},)])
def test_what_is_no_pattern_is_refused(patterns):
    with pytest.raises(TypeError, match="pass patterns such as"):
        by_name(*patterns)


def test_a_learner_takes_a_dict_for_a_splitter():
    learn = learner(opt_func=Adam, splitter={"backbone.*": {"lr": 1e-4}, "head.*": {}})
    learn.fit(1)
    assert [h["lr"] for h in learn.opt.hypers] == [1e-4, 0.1]
    assert repr(learn.splitter) == "by_name({'backbone.*': {'lr': 0.0001}, 'head.*': {}})"


def test_a_rate_that_is_passed_is_for_all_groups_a_schedule_takes_their_own():
    learn = learner(splitter={"backbone.*": {"lr": 1e-4}, "head.*": {}})
    learn.fit(1, lr=0.2)
    assert [h["lr"] for h in learn.opt.hypers] == [0.2, 0.2]
    tops = []
    learn.fit_one_cycle(4, cbs=ll.Callback(after_batch=lambda cb: tops.append([h["lr"] for h in cb.opt.hypers])))
    assert max(tops) == pytest.approx([1e-4, 0.1])


def test_the_decay_of_a_group_wins_over_the_learners():
    learn = learner(wd=0.3, splitter={"backbone.*": {"wd": 0.0}, "head.*": {}})
    learn.fit(1)
    assert [h["wd"] for h in learn.opt.hypers] == [0.0, 0.3]
    learn.fit(1, wd=0.5)
    assert [h["wd"] for h in learn.opt.hypers] == [0.5, 0.5]


def test_a_splitter_by_name_can_be_pickled():
    splitter = pickle.loads(pickle.dumps(by_name("backbone.*", "head.*")))
    assert names(splitter(Net())) == names(by_name("backbone.*", "head.*")(Net()))


# names in print


def test_the_optimizer_of_a_learner_prints_what_its_groups_are():
    learn = learner(opt_func=SGD, splitter=lambda m: [list(m.backbone.parameters()), list(m.head.parameters())])
    learn.freeze()
    assert repr(learn.opt) == (
        "SGD, 2 parameter groups\n"
        "  0: backbone.*, 6 tensors with 40 values, lr=0.1, mom=0, wd=0, frozen\n"
        "  1: head.*, 2 tensors with 5 values, lr=0.1, mom=0, wd=0"
    )


def test_the_optimizers_of_torch_print_them_too():
    learn = learner(opt_func=torch.optim.SGD, splitter=by_name("backbone.*", "*"))
    learn.create_opt()
    assert repr(learn.opt) == (
        "OptimWrapper of SGD, 2 parameter groups\n"
        "  0: backbone.*, 6 tensors with 40 values, lr=0.1, mom=0, dampening=0, wd=0\n"
        "  1: *, 2 tensors with 5 values, lr=0.1, mom=0, dampening=0, wd=0"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], ""),
        (["a.weight"], "a.weight"),
        (["a.weight", "a.bias"], "a.*"),
        (["a.0.weight", "a.0.bias"], "a.0.*"),
        (["0.weight", "0.bias", "2.weight"], "0.weight … 2.weight"),
    ],
)
def test_names_are_said_in_a_few_words(given, said):
    assert summary_of(given) == said


def test_one_flat_group_stays_flat_and_unknown_parameters_have_no_name():
    model, stranger = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
    group = with_names([*model.parameters(), stranger], model)
    assert (len(group), group.names, group.layers) == (3, ["weight", "bias", ""], [model, model, None])


def test_named_parameters_are_taken_as_they_are():
    opt = SGD(nn.Linear(2, 1).named_parameters(), 0.1)
    assert repr(opt).splitlines()[1] == "  0: weight … bias, 2 tensors with 3 values, lr=0.1, mom=0, wd=0"


# norm layers and biases


def test_norm_and_bias_params_are_those_of_norm_layers_and_every_bias():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 1, bias=False))
    kept = [model[0].bias, *model[1].parameters(), *model[2].parameters()]
    assert [id(p) for p in ll.norm_bias_params(model)] == [id(p) for p in kept]
    assert [id(p) for p in ll.norm_bias_params(model, with_bias=False)] == [id(p) for p in kept[1:]]
    assert ll.bn_bias_params is ll.norm_bias_params


def test_freezing_keeps_norm_layers_trained_unless_asked_not_to():
    def trained(train_bn):
        learn = learner(splitter=by_name("backbone.*", "head.*"), train_bn=train_bn)
        learn.freeze()
        return [name for name, p in learn.model.named_parameters() if p.requires_grad]

    assert trained(True) == ["backbone.1.weight", "backbone.1.bias", "head.weight", "head.bias"]
    assert trained(False) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("opt_func", [SGD, torch.optim.SGD])
@pytest.mark.parametrize(("wd_bn_bias", "shrunk"), [(False, [True, False]), (True, [True, True])])
def test_decay_leaves_biases_alone_unless_asked_not_to(opt_func, wd_bn_bias, shrunk):
    learn = toy_learner(opt_func=opt_func, model=nn.Linear(2, 1), wd_bn_bias=wd_bn_bias, wd=0.5)
    learn.create_opt()
    learn.opt.set_hypers(wd=0.5, lr=0.1)
    for p in learn.model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    learn.opt.step()
    assert [bool((p < 1).all()) for p in learn.model.parameters()] == shrunk


# Layers that normalize, of torch and of models


class LlamaRMSNorm(nn.Module):
    """As language models bring it along: torch's own came later."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class T5LayerNorm(LlamaRMSNorm):
    pass


class RMSNormGated(LlamaRMSNorm):
    pass


class NormalizedLinear(LlamaRMSNorm):
    pass


class PreNorm(nn.Module):
    """A block around another one, as many transformers are written: not all of it normalizes."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)
        self.mixing = nn.Parameter(torch.ones(4, 4))


def found_in(model, with_bias=True):
    found = {id(p) for p in norm_bias_params(model, with_bias)}
    return [name for name, p in model.named_parameters() if id(p) in found]


def test_the_parameters_of_torchs_normalization_layers_and_all_biases_are_found():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 4)), nn.RMSNorm(4)
    )
    assert found_in(model) == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias", "4.weight"]
    assert found_in(model, with_bias=False) == [name for name in found_in(model) if name != "0.bias"]


@pytest.mark.parametrize("norm", [LlamaRMSNorm, T5LayerNorm, RMSNormGated])
def test_a_normalization_layer_that_a_model_brings_along_is_known_by_its_name(norm):
    assert found_in(nn.Sequential(nn.Linear(4, 4), norm()), with_bias=False) == ["1.weight"]


def test_what_only_sounds_like_one_is_none():
    assert found_in(NormalizedLinear()) == []


def test_of_a_block_around_others_only_what_normalizes_counts():
    assert found_in(PreNorm(), with_bias=False) == ["norm.weight", "norm.bias"]


def test_a_bias_that_is_no_parameter_is_none():
    assert found_in(nn.Linear(4, 4, bias=False)) == []


def test_a_parameter_that_two_layers_share_is_found_once():
    norm = nn.LayerNorm(4)
    assert len(norm_bias_params(nn.Sequential(norm, nn.Linear(4, 4), norm))) == 3


def test_frozen_parameters_are_parameters_but_not_trainable_ones():
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    assert (len(params(model)), len(trainable_params(model))) == (2, 1)


def test_a_function_has_no_parameters():
    assert [*params(torch.relu), *trainable_params(torch.relu), *norm_bias_params(torch.relu)] == []
