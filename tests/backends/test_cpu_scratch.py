"""Memory that the CPU half's calls in training share, one after the other."""

import threading

import pytest
import torch

from tests.extension_cases import require
from vovnet_fast.backends import cpu, reference
from vovnet_fast.backends.cpu import convolution, packing, scratch


@pytest.fixture(autouse=True)
def _built(monkeypatch):
    require("cpu")
    torch.manual_seed(0)
    monkeypatch.setattr(scratch, "_kept", scratch._Kept())


def test_the_same_memory_is_lent_again():
    first = scratch.lend("tiles", 100)
    assert len(first) == 100
    assert first.dtype == torch.uint8
    assert first.data_ptr() % 64 == 0
    larger = scratch.lend("tiles", 5 << 20)
    assert scratch.lend("tiles", 100).data_ptr() == larger.data_ptr()
    assert scratch.lend("sums", 100).data_ptr() != larger.data_ptr()


def test_what_is_large_is_not_kept():
    large = scratch.lend("tiles", scratch.MOST + 1)
    assert len(large) == scratch.MOST + 1
    assert not scratch._kept.by_role


def test_memory_lent_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        lent = scratch.lend("tiles", 8)
    assert not lent.is_inference()
    scratch.lend("tiles", 8).zero_()


def test_every_thread_has_its_own():
    found = [scratch.lend("tiles", 64)]
    thread = threading.Thread(target=lambda: found.append(scratch.lend("tiles", 64)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != found[1].data_ptr()


def layer(dtype, c_out, kernel, c_in):
    x = torch.randn(2, 9, 7, c_in).to(dtype)
    g = torch.randn(2, 9, 7, c_out).to(dtype)
    weight = torch.randn(c_out, kernel, kernel, c_in, requires_grad=True)
    return x, g, weight, torch.rand(c_out) + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_lies_in_it_and_none_depends_on_what_was_there(dtype):
    """A small layer after a large one, whose numbers are still there, and after NaN."""
    layers = [layer(dtype, 48, 3, 40), layer(dtype, 5, 3, 20), layer(dtype, 7, 1, 33)]
    found = []
    for _ in range(2):
        for x, g, weight, scale in layers:
            out, dx = torch.empty_like(g), torch.empty_like(x)
            cpu.conv(x, weight, scale, scale, out)
            cpu.conv_input_grad(g, weight, scale, dx)
            found.append((out, dx, *cpu.conv_weight_grad(x, g, weight, scale)))
            found.append(cpu.conv_weight_grad(x, g, weight, None)[::2])
        for _, memory in scratch._kept.by_role.values():
            memory.fill_(255)
    assert set(scratch._kept.by_role) >= {"tiles", "sums"}
    half = len(found) // 2
    for before, after in zip(found[:half], found[half:]):
        assert all(map(torch.equal, before, after))
        assert all(tensor.isfinite().all() for tensor in after)


def test_weights_that_are_kept_have_memory_of_their_own():
    weight = torch.randn(8, 3, 3, 16)
    one = convolution.stand_in(weight, 2)
    tiles = packing._kept[one][convolution.choose_engine(weight.dtype)].tiles
    before = tiles.clone()
    x, g, other, scale = layer(torch.float32, 48, 3, 40)
    cpu.conv_input_grad(g, other, scale, torch.empty_like(x))
    assert torch.equal(tiles, before)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6), (13, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_input_gradients_with_a_stride(dtype, size, kernel):
    """Of even and odd sizes, into a slot, with weights as modules have them in either layout."""
    buffer = torch.full((2, *size, 30), float("nan"), dtype=dtype)
    out, mask = buffer[..., 4:24], torch.randn(2, *size, 20).to(dtype)
    g = torch.randn(2, *((s - 1) // 2 + 1 for s in size), 9).to(dtype)
    scale = torch.rand(9) + 0.5
    for layout in (torch.contiguous_format, torch.channels_last):
        module = torch.randn(9, 20, kernel, kernel).to(memory_format=layout)
        weight = module.permute(0, 2, 3, 1)
        cpu.conv_input_grad(g, weight, scale, out, stride=2, mask=mask)
        exact = torch.empty(2, *size, 20, dtype=torch.float64)
        high = (t.double() for t in (g, weight, scale))
        reference.conv_input_grad(*high, exact, stride=2, mask=mask.double())
        eager = torch.empty_like(out)
        reference.conv_input_grad(g, weight.to(dtype), scale.to(dtype), eager, stride=2, mask=mask)
        error, theirs = ((t.double() - exact).abs().max() for t in (out, eager))
        # Of few products eager's own error is by chance less than one rounding of the sum.
        assert error <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max()
        assert buffer[..., :4].isnan().all()
        assert buffer[..., 24:].isnan().all()
