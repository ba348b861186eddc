"""The self-check of backends: what it finds, and what it takes."""

import math

import pytest
import torch

from tests.features import compared, marked
from tests.stand_in import FUNCTIONS, stand_in
from vovnet_fast import selfcheck
from vovnet_fast.backends import reference


@pytest.fixture
def fake(monkeypatch):
    return stand_in(monkeypatch)


@pytest.mark.parametrize("slim", [True, False])
def test_every_function_is_checked_and_the_reference_passes(slim):
    dtypes = compared(selfcheck.DTYPES)
    rows = selfcheck.run("reference", "cpu", dtypes, slim=slim)
    assert {row.function for row in rows} == set(FUNCTIONS)
    assert {row.dtype for row in rows} == set(dtypes)
    for row in rows:
        assert row.passed, row
        assert row.error <= row.allowed
        assert row.problem == ""


def only(backend, function, dtype=torch.float16):
    rows = selfcheck.run(backend, "cpu", [dtype], [function])
    assert {(row.function, row.dtype) for row in rows} == {(function, dtype)}
    return rows


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_does_nothing_is_found(fake, function):
    """Its outputs stay NaN, or are zero, or are not there at all."""

    def idle(*args, **options):
        found = getattr(reference, function)(*[_copy(a) for a in args], **_copies(options))
        if isinstance(found, tuple):
            return tuple(None if t is None else torch.zeros_like(t) for t in found)
        return None if found is None else torch.zeros_like(found)

    setattr(fake, function, idle)
    assert not any(row.passed for row in only("fake", function))


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _copies(options):
    return {name: _copy(value) for name, value in options.items()}


@pytest.mark.parametrize("dtype", marked(selfcheck.DTYPES), ids=str)
def test_an_error_of_a_few_roundings_is_found(fake, dtype):
    def inexact(x, weight, out, *, stride):
        reference.depthwise(x, weight, out, stride=stride)
        out.mul_(1 + 16 * torch.finfo(dtype).eps)

    fake.depthwise = inexact
    for row in only("fake", "depthwise", dtype):
        assert not row.passed
        assert row.allowed < row.error < 20 * row.allowed
        assert f"error {row.error:.3g}, allowed {row.allowed:.3g}" in str(row)


def test_a_write_beside_the_slot_is_found(fake):
    def spill(z, gates, identity, out):
        reference.apply_gates(z, gates, identity, out)
        n, h, w, c = out.shape
        out.as_strided((n, h, w, c + 1), out.stride())[..., c] = 0

    fake.apply_gates = spill
    for row in only("fake", "apply_gates"):
        assert (row.passed, row.problem) == (False, "it wrote outside its slot")


def test_a_read_beside_the_slot_is_found(fake):
    def stray(z, gates, identity, out):
        reference.apply_gates(z, gates, identity, out)
        n, h, w, c = z.shape
        out[0, 0, 0, 0] += z.as_strided((n, h, w, c + 1), z.stride())[0, 0, 0, c]

    fake.apply_gates = stray
    for row in only("fake", "apply_gates"):
        assert not row.passed
        assert row.error == math.inf


def test_what_cannot_run_has_a_row_as_well(fake):
    def refuse(*args):
        raise RuntimeError("out of registers")

    fake.gate_sums = refuse
    del fake.normalize
    fake.depthwise_weight_grad = lambda x, g, *, stride: x[0]
    rows = selfcheck.run("fake", "cpu", [torch.float32])
    problems = {row.function: row.problem for row in rows if not row.passed}
    assert problems == {
        "gate_sums": "RuntimeError: out of registers",
        "normalize": "AttributeError: module 'vovnet_fast.backends.fake' has no attribute "
        "'normalize'",
        "depthwise_weight_grad": "its outputs are [[1, 5, 56]]",
    }
    with pytest.raises(ValueError, match="no function is called convolve"):
        selfcheck.run("fake", "cpu", functions=["convolve"])


def test_surroundings_of_the_caller_change_nothing():
    functions = ["conv", "max_pool"]
    expected = selfcheck.run("reference", "cpu", functions=functions)
    state = torch.get_rng_state()
    with (
        torch.device("meta"),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert selfcheck.run("reference", "cpu", functions=functions) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_the_slim_check_is_a_part_of_the_thorough_one():
    names = [(case.function, case.words) for case in selfcheck.CASES]
    assert len(set(names)) == len(names)
    slim, thorough = (
        {
            row.case
            for row in selfcheck.run("reference", "cpu", [torch.float32], ["conv"], slim=slim)
        }
        for slim in (True, False)
    )
    assert slim == {c.words for c in selfcheck.CASES if c.slim and c.function == "conv"}
    assert slim < thorough
