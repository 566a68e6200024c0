"""Small tables as HTML."""

from learnloop import html


def test_a_table_has_a_cell_for_everything_escaped():
    assert html.table([["<b>", 0.5], [None, 3]], ["a & b", "n"], "x < y") == (
        "<table><caption>x &lt; y</caption><thead><tr><th>a &amp; b</th><th>n</th></tr></thead>"
        "<tbody><tr><td>&lt;b&gt;</td><td>0.500000</td></tr><tr><td></td><td>3</td></tr></tbody></table>"
    )


def test_without_titles_there_is_no_head():
    assert html.table([[1]]) == "<table><tbody><tr><td>1</td></tr></tbody></table>"


def test_text_is_escaped():
    assert html.paragraph("a < b") == "<p>a &lt; b</p>"
    assert html.code("a\n  <b>") == "<pre>a\n  &lt;b&gt;</pre>"


def test_details_unfold_what_is_html_already():
    inner = html.table([[1]])
    assert html.details("a < b", inner) == f"<details><summary>a &lt; b</summary>{inner}</details>"
    assert html.details("a", is_open=True) == "<details open><summary>a</summary></details>"
