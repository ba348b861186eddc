"""What the kernel tests share.

With a GPU the kernels are compiled and run on it. Without one they run in Triton's
interpreter, on the CPU: it is chosen by an environment variable that Triton reads
when it is imported, hence the assignment before anything imports it.
"""

import os
import warnings
from dataclasses import dataclass

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from tests.kernels import interpreter  # noqa: E402
from vovnet_fast import backends  # noqa: E402

_MISSING = backends.why_not("triton", None)
if _MISSING is None and not ON_GPU:
    interpreter.hasten()

GUARD = 16
"""Channels on either side of a slot: a multiple of 16 bytes in every dtype."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pytest_pycollect_makemodule(module_path, parent):
    """Without a Triton that can be used, each module is skipped instead of imported."""
    return None if _MISSING is None else _Left.from_parent(parent, path=module_path)


class _Left(pytest.Module):
    def collect(self):
        pytest.skip(_MISSING, allow_module_level=True)


@pytest.fixture(autouse=True)
def _surroundings():
    from vovnet_fast.kernels._triton import interpreted

    assert ON_GPU or interpreted(), (
        "Triton was imported before tests/kernels/conftest.py could choose its interpreter; "
        "run these tests in a process of their own: pytest tests/kernels"
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # NumPy, under the interpreter, warns about the NaN and Inf that tests put in.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(
    params=[torch.float64, torch.float32, torch.float16, torch.bfloat16],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def dtype(request):
    if ON_GPU and request.param == torch.float64:
        pytest.skip("fp64 is served in the interpreter only")
    return request.param


def _embed(shape, dtype, device, crop):
    """A NaN-filled buffer and a view of the given shape inside it, guarded on all sides."""
    n, h, w, c = shape
    border = 1 if crop else 0
    buffer = torch.full(
        (n, h + 2 * border, w + 2 * border, c + 2 * GUARD), float("nan"), dtype=dtype, device=device
    )
    view = buffer[:, border : border + h, border : border + w, GUARD : GUARD + c]
    return buffer, view


@pytest.fixture
def embed(device):
    """Put values into a slot whose surroundings are NaN: whoever reads these is found out.

    ``crop`` surrounds every image with a border of NaN pixels as well, so that its rows
    do not follow each other.
    """

    def embed(values, dtype, *, crop=False):
        _, view = _embed(values.shape, dtype, device, crop)
        return view.copy_(values)

    return embed


@dataclass
class Output:
    view: torch.Tensor
    buffer: torch.Tensor

    def __post_init__(self):
        self.before = self.buffer.clone()

    def assert_guards_untouched(self):
        """Bit for bit: NaN compares unequal to itself."""
        bits = _BITS[self.buffer.dtype.itemsize]
        expected = self.before.as_strided(
            self.view.shape, self.view.stride(), self.view.storage_offset()
        )
        expected.copy_(self.view)
        assert torch.equal(self.buffer.view(bits), self.before.view(bits))


@pytest.fixture
def output(device):
    """A slot to write to, full of NaN, that knows what its surroundings were."""

    def output(shape, dtype, *, crop=False):
        buffer, view = _embed(shape, dtype, device, crop)
        return Output(view, buffer)

    return output


@pytest.fixture
def assert_accurate():
    """Assert an error of at most twice that of eager in the same dtype, plus one rounding.

    ``exact`` is the result in fp64, ``eager`` the one in the dtype of ``actual``. fp64
    itself must agree to 1e-12. One rounding is a unit in the last place of
    ``magnitude``: of the result, or for a sum that of its terms added up.
    """

    def assert_accurate(actual, eager, exact, magnitude=None):
        assert exact.dtype == torch.float64
        assert actual.shape == exact.shape == eager.shape
        error = (actual.double() - exact).abs()
        magnitude = exact.abs() if magnitude is None else magnitude
        if actual.dtype == torch.float64:
            allowed = 1e-12 * (1 + magnitude)
        else:
            unit = torch.finfo(actual.dtype).eps
            allowed = 2 * (eager.double() - exact).abs().max() + unit * magnitude
        assert not error.isnan().any(), "some elements were not written, or NaN was read"
        excess = (error - allowed).max().item()
        assert excess <= 0, f"error up to {error.max().item():.3g}, {excess:.3g} too much"

    return assert_accurate


def nonfinite(tensor):
    """0 for finite, otherwise 1, 2, 3 for NaN, Inf, -Inf."""
    return tensor.isnan() + 2 * tensor.isposinf() + 3 * tensor.isneginf()


@pytest.fixture
def assert_same_nonfinite():
    """Assert NaN and infinities in exactly the same places."""

    def assert_same_nonfinite(actual, expected):
        assert torch.equal(nonfinite(actual), nonfinite(expected))
        assert nonfinite(expected).any(), "the test should produce something non-finite"

    return assert_same_nonfinite
