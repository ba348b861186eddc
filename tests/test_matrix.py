"""tests.matrix: the table of versions is kept by versions."""

import subprocess

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


@pytest.mark.parametrize(
    ("code", "output", "found"),
    [
        (0, "....\n4 passed, 1 skipped, 2 warnings in 1.00s", "4 passed, 1 skipped"),
        (1, "1 failed, 2 passed, 1 error in 1.00s", "1 failed, 2 passed, 1 errors"),
        (1, "FAILED a\n12 failed, 3 errors in 1.00s", "12 failed, 3 errors"),
        (0, "9 skipped in 1.00s", "9 skipped"),
        (5, "20 deselected in 1.00s", "no tests"),
        (-11, "...", "1 errors"),
        (3, "", "1 errors"),
    ],
)
def test_what_pytest_found_is_counted(code, output, found):
    done = subprocess.CompletedProcess([], code, output, "")
    assert matrix.written(matrix.counted(done)) == found


def test_the_whole_is_every_file_of_its_folders():
    files = [file for [file] in matrix.pieces(whole=True)]
    assert {file.split("/")[1] for file in files} == {*matrix.WHOLE}
    assert "tests/network/test_model.py" in files
    assert len(files) == len({*files})
