"""For cells: `from learnloop.all import *` brings every public name, and torch, nn, F, np, plt, partial, Path."""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastcore.basics import camel2snake, detuplify, first, ifnone, listify, noop, patch, range_of, store_attr, tuplify
from fastcore.foundation import L
from fastcore.meta import delegates
from torch import Tensor, nn, tensor

import learnloop as ll
from learnloop.data.batches import default_device, find_bs, to_cpu, to_detach, to_device, to_float, to_half
from learnloop.optim.schedules import even_mults

globals().update({name: getattr(ll, name) for name in ll.__all__})
TensorBase = Tensor  # the name under which callbacks written for fastai know it

_helpers = (
    *(partial, Path, plt, np, torch, F, nn, Tensor, tensor, L, delegates, camel2snake, detuplify, first, ifnone),
    *(listify, noop, patch, range_of, store_attr, tuplify, default_device, find_bs, to_cpu, to_detach, to_device),
    *(to_float, to_half, even_mults, TensorBase, ll),
)
__all__ = sorted({*ll.__all__, *(name for name, value in globals().items() if any(value is h for h in _helpers))})
