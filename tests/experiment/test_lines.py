"""Files of JSON lines."""

import math

import pytest

from learnloop.experiment.lines import append_line, read_lines


def test_lines_come_back_in_their_order_and_the_folder_is_made(tmp_path):
    path = tmp_path / "deep" / "study.jsonl"
    for i in range(3):
        append_line(path, {"i": i, "x": math.nan})
    assert list(read_lines(path)) == [{"i": i, "x": None} for i in range(3)]


@pytest.mark.parametrize("cut", [b'{"i": 1', b'{"i": 1}', b"\xff\xfe{", b'"text"', b"[1]"])
def test_a_damaged_last_line_is_left_out_and_the_next_one_begins_anew(tmp_path, cut):
    path = tmp_path / "study.jsonl"
    append_line(path, {"i": 0})
    with path.open("ab") as file:
        file.write(cut)
    whole = [{"i": 0}, *([{"i": 1}] if cut == b'{"i": 1}' else [])]
    assert list(read_lines(path)) == whole
    append_line(path, {"i": 2})
    assert list(read_lines(path)) == [*whole, {"i": 2}]
