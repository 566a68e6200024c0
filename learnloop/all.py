"""For cells: `from learnloop.all import *` brings every public name, and torch, nn, F, np, plt, partial, Path.

With them come the helpers and the parts of the standard library that callbacks written for fastai take from its own
star import.
"""
# ruff: noqa: F401  (what is imported here is there to be imported from here)

import json
import math
import os
import random
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Optional
from warnings import warn

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastcore.basics import camel2snake, detuplify, first, ifnone, listify, noop, patch, range_of, store_attr, tuplify
from fastcore.foundation import L
from fastcore.meta import delegates
from fastcore.xtras import is_listy, join_path_file
from torch import Tensor, nn

import learnloop as ll
from learnloop.data.tensors import tensor, unsqueeze
from learnloop.machine import ismin_torch, notmax_torch
from learnloop.modules import Module, one_param
from learnloop.optim.schedules import even_mults

TensorBase = Tensor  # callbacks written for fastai know it under this name
globals().update({name: getattr(ll, name) for name in ll.__all__})

__all__ = sorted(name for name in globals() if not name.startswith("_"))
