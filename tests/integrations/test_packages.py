"""Packages that an extra brings."""

import json

import pytest

from learnloop.integrations.packages import imported


def test_a_module_that_is_there_is_imported():
    assert imported("json", "X", "x") is json


def test_one_that_is_not_there_is_named_with_its_user_and_its_extra():
    with pytest.raises(ImportError, match=r"^`XCallback` needs no_such_package: `pip install 'learnloop\[x\]'`\.$"):
        imported("no_such_package.inside", "XCallback", "x")
