"""tests/test_bad_inputs.py on the Triton backend, which the interpreter runs here."""

import pytest
import torch

from tests.test_bad_inputs import ROWS, before, check, subjects  # noqa: F401


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors, for the interpreter")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.entry}: {row.wrong}")
def test_an_exception_helps(row, subjects, before):  # noqa: F811
    check(row, "triton", subjects, before)
