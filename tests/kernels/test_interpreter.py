"""The interpreter that all kernels run in here does what Triton's own does."""

import pytest
import torch

from tests.kernels import interpreter
from tests.kernels.conftest import ON_GPU
from vovnet_fast import backends, ops
from vovnet_fast.compat import zip

if ON_GPU or not interpreter.hasten():
    pytest.skip("this Triton's interpreter is not replaced", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter as triton_interpreter


def block(dtype):
    """A block's result and gradients, by kernels for every one of its parts."""
    torch.manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    def layer(c_in, c_out, kernel=3, taps=None, eps=1e-5):
        scale, shift = (tensor(c_out).float().detach().requires_grad_() for _ in "ab")
        if dtype == torch.float64:
            scale, shift = (t.detach().double().requires_grad_() for t in (scale, shift))
        return ops.ConvParams(tensor(c_out, kernel, kernel, c_in), scale, shift, 1, taps, eps)

    layers = (layer(16, 8), layer(8, 8, 1, tensor(3, 3, 8)))
    params = ops.BlockParams(
        layers, layer(32, 16, 1, eps=None), None, tensor(16, 16), tensor(16), "sigmoid", True
    )
    x = tensor(2, 16, 5, 6)
    with backends.use_backend("triton"):
        out = ops.osa_block(x, params)
        out.float().square().mean().backward()
    tensors = [t for p in params.convs() for t in p if isinstance(t, torch.Tensor)]
    return [out.detach(), *(t.grad for t in (x, *tensors, *params.fcs()))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_results_are_the_same_bits(dtype):
    hastened = block(dtype)
    with interpreter.as_released():
        own = block(dtype)
    assert len(own) == 14
    for a, b in zip(hastened, own, strict=True):
        assert torch.equal(a, b)


def both(question):
    """What the interpreter says the first time and, remembering, the second; and Triton's own."""
    hastened = [question(), question()]
    with interpreter.as_released():
        return hastened, [question()] * 2


SCALARS = [
    tl.int1, tl.int8, tl.uint8, tl.int16, tl.uint16, tl.int32, tl.uint32, tl.int64, tl.uint64,
    tl.float16, tl.bfloat16, tl.float32, tl.float64, tl.float8e5,
]  # fmt: skip


@pytest.mark.parametrize("scalar", SCALARS, ids=str)
def test_dtypes(scalar):
    pointer = tl.pointer_type(scalar)
    for dtype in (scalar, pointer, tl.block_type(scalar, [4]), tl.block_type(pointer, [4])):
        hastened, own = both(lambda d=dtype: triton_interpreter._get_np_dtype(d))
        assert hastened == own


@pytest.mark.parametrize("kind", ["one", "two", "constants", "a tuple of Triton's"])
def test_shapes(kind):
    shape = {
        "one": [8],
        "two": [4, 1],
        "constants": [tl.constexpr(2), 4],
        "a tuple of Triton's": tl.core.tuple([2, 2, 2]),
    }[kind]

    def describe():
        block = tl.block_type(tl.float32, shape)
        tensor = tl.core.tensor(None, block)
        shapes = [(type(s), [*map(str, s)]) for s in (block.shape, tensor.shape)]
        numbers = (block.numel, block.name, block.element_ty, tensor.numel.value, tensor.dtype)
        return shapes, numbers, tensor.type is block

    hastened, own = both(describe)
    assert hastened == own


def test_the_shape_of_a_number():
    tensor = tl.core.tensor(None, tl.int32)
    assert (tensor.shape.values, tensor.numel.value, tensor.dtype) == ([], 1, tl.int32)


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ([3], ValueError),
        ([2**21], ValueError),
        ([], TypeError),
        ([2.0], TypeError),
        ((4, 1), AssertionError),
        (8, AssertionError),
    ],
)
def test_what_is_no_shape_is_refused_each_time(shape, error):
    tl.block_type(tl.float32, [4, 1])
    for _ in "ab":
        with pytest.raises(error):
            tl.block_type(tl.float32, shape)
