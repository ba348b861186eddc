"""tests.matrix: the table of versions is kept by versions."""

import pytest

from tests import matrix


def document(*rows):
    head = "| Python | torch | Triton | NumPy | tests | found | commit, date |\n|---|---|"
    return "\n".join(["# Page", matrix.BEGIN, head, *rows, matrix.END, "after"])


def row(torch, found="5 passed", tests="`versions`"):
    return f"| 3.10.13 | {torch} | none | 1.26.4 | {tests} | {found} | abc, 2026-01-01 |"


def test_rows_are_added_in_order_and_replaced():
    page = matrix.updated(document(row("2.11.0"), row("2.4.1")), [row("2.4.1", "6 passed")])
    assert page == document(row("2.4.1", "6 passed"), row("2.11.0"))
    page = matrix.updated(page, [row("2.4.1", "9 passed", "all")])
    assert page == document(
        row("2.4.1", "6 passed"), row("2.4.1", "9 passed", "all"), row("2.11.0")
    )


def test_the_page_has_the_table():
    text = matrix.TABLE.read_text()
    assert matrix.updated(text, []) == text


def test_an_unknown_environment(capsys):
    with pytest.raises(SystemExit):
        matrix.main(["2.99"])
    assert "no environment 2.99" in capsys.readouterr().err
