"""Rows of numbers, kept until somebody looks."""

import torch

from learnloop.insight.series import FOLD, Series


def test_a_series_folds_its_rows_and_gives_them_back_in_order():
    rows = Series()
    for i in range(2 * FOLD + 3):
        rows.append(i, torch.tensor([i, -i]))
    assert len(rows._recent) == 3
    assert rows.numbers().tolist() == [[i, -i] for i in range(2 * FOLD + 3)]
    heir = Series()
    heir.load_state_dict(rows.state_dict())
    heir.append(7, torch.tensor([7, -7]))
    assert heir.numbers().tolist() == [*rows.numbers().tolist(), [7, -7]]
    assert heir.iters[-2:] == [2 * FOLD + 2, 7]


def test_an_empty_series_has_no_numbers():
    heir = Series()
    heir.load_state_dict(Series().state_dict())
    assert (len(heir), heir.numbers().tolist()) == (0, [])
