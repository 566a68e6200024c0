"""Which parameters are those of normalization layers, or biases; what a model without parameters has."""

import pytest
import torch
from torch import nn

from learnloop.optim.groups import norm_bias_params, params, trainable_params


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


def names(model, with_bias=True):
    found = {id(p) for p in norm_bias_params(model, with_bias)}
    return [name for name, p in model.named_parameters() if id(p) in found]


def test_the_parameters_of_torchs_normalization_layers_and_all_biases_are_found():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 4)), nn.RMSNorm(4)
    )
    assert names(model) == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias", "4.weight"]
    assert names(model, with_bias=False) == [name for name in names(model) if name != "0.bias"]


@pytest.mark.parametrize("norm", [LlamaRMSNorm, T5LayerNorm, RMSNormGated])
def test_a_normalization_layer_that_a_model_brings_along_is_known_by_its_name(norm):
    assert names(nn.Sequential(nn.Linear(4, 4), norm()), with_bias=False) == ["1.weight"]


def test_what_only_sounds_like_one_is_none():
    assert names(NormalizedLinear()) == []


def test_of_a_block_around_others_only_what_normalizes_counts():
    assert names(PreNorm(), with_bias=False) == ["norm.weight", "norm.bias"]


def test_a_bias_that_is_no_parameter_is_none():
    assert names(nn.Linear(4, 4, bias=False)) == []


def test_a_parameter_that_two_layers_share_is_found_once():
    norm = nn.LayerNorm(4)
    assert len(norm_bias_params(nn.Sequential(norm, nn.Linear(4, 4), norm))) == 3


def test_frozen_parameters_are_parameters_but_not_trainable_ones():
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    assert (len(params(model)), len(trainable_params(model))) == (2, 1)


def test_a_function_has_no_parameters():
    assert [*params(torch.relu), *trainable_params(torch.relu), *norm_bias_params(torch.relu)] == []
