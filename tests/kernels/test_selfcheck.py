"""The self-check of the Triton backend: in the interpreter, or on a GPU."""

import dataclasses

import pytest
import torch

from vovnet_fast import selfcheck
from vovnet_fast.backends import triton as backend
from vovnet_fast.kernels import _common

FUNCTIONS = sorted({case.function for case in selfcheck.CASES})
DTYPES = selfcheck.DTYPES
if not torch.cuda.is_available():  # The interpreter is slow, and has its own way with bf16.
    DTYPES = (torch.float16, torch.float32)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_passes(function, device):
    rows = selfcheck.run("triton", device, DTYPES, [function])
    assert {row.dtype for row in rows} == set(DTYPES)
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("function", ["depthwise", "gate_sums"])
def test_a_broken_kernel_is_found_and_named(function, device, monkeypatch):
    """Its launches leave out the last program."""
    run = _common.Launch.run

    def short(launch, device):
        first = max(launch.grid[0] - 1, 1)
        smaller = (first, *launch.grid[1:])
        run(dataclasses.replace(launch, grid=smaller), device)

    right = getattr(backend, function)

    def broken(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(_common.Launch, "run", short)
            return right(*args, **options)

    monkeypatch.setattr(backend, function, broken)
    rows = selfcheck.run("triton", device, [torch.float16], [function, "apply_gates"])
    assert {row.function for row in rows if not row.passed} == {function}
    assert {row.function for row in rows if row.passed} == {"apply_gates"}
