"""A file of blocks: begun, added to, gone on with."""

import pytest

from learnloop.callbacks.blockfile import BlockFile, blocks_in


@pytest.fixture
def log(tmp_path):
    made = BlockFile("#")
    made.open(tmp_path / "new" / "log")
    yield made
    made.close()


def text(log):
    return open(log._file.name).read()


def test_lines_are_there_as_soon_as_they_are_written(log):
    log.begin("# one", append=False)
    log.write("a")
    assert text(log) == "# one\na\n" and log.place == (0, 8)


def test_a_new_block_replaces_everything_or_is_added(log):
    log.begin("# one", append=False)
    log.begin("# two", append=True)
    assert text(log) == "# one\n# two\n" and log.place == (6, 12)
    log.begin("# three", append=False)
    assert text(log) == "# three\n"


def test_opening_changes_nothing(log, tmp_path):
    log.begin("# one", append=False)
    again = BlockFile("#")
    again.open(tmp_path / "new" / "log")
    again.write("lost, because no block was begun")
    again.close()
    assert text(log) == "# one\n" and again.place is None


def test_going_on_takes_out_what_came_later_and_moves_behind_the_blocks_of_others(log, tmp_path):
    log.begin("# one", append=False)
    log.write("a")
    place = log.place
    log.write("b")
    log.begin("# two", append=True)
    log.write("c")
    again = BlockFile("#")
    again.open(tmp_path / "new" / "log")
    again.go_on(place)
    again.write("d")
    again.close()
    assert text(log) == "# two\nc\n# one\na\nd\n"


@pytest.mark.parametrize("place", [(0, 100), (1, 6)])
def test_in_another_file_nothing_is_gone_on_with(log, place):
    log.begin("# one", append=False)
    log.place = None
    log.go_on(place)
    assert log.place is None and text(log) == "# one\n"


def test_a_block_begins_only_at_the_start_of_a_line():
    assert blocks_in(b"a # b\n# c\nd\n", b"#") == b"# c\nd\n"
    assert blocks_in(b"# a\n", b"#") == b"# a\n" and blocks_in(b"a\n", b"#") == b""
