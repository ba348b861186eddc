"""Calls of the extension's CPU half that are recorded, and made again on other addresses."""

import threading

import pytest
import torch

from tests.csrc.test_binding import run_python, sums
from tests.extension_cases import require
from vovnet_fast.backends import _extension


@pytest.fixture
def extension():
    require("cpu")
    return _extension.load("cpu")


@pytest.fixture
def recorded(extension):
    """A recording of one call, and the memory that it moves: what is read, what is written."""
    memory, fields = sums()
    with extension.Recording() as calls:
        extension.channel_sums(1, **fields)
    calls.move([(memory[0].data_ptr(), 16), (memory[2].data_ptr(), 16)])
    return calls, memory


def test_a_recording_looks_at_addresses(recorded):
    calls, memory = recorded
    x, out = torch.full((4,), 2.0), torch.zeros(4)
    calls.run(1, [x.data_ptr(), out.data_ptr()])
    assert out.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="addresses of 2 pieces of memory, got 1"):
        calls.run(1, [x.data_ptr()])
    for bad in (0, 8):
        with pytest.raises(ValueError, match="a piece's address must be the address of a tensor"):
            calls.run(1, [x.data_ptr(), bad])
    with pytest.raises(ValueError, match="out must be an address that is a multiple of 4"):
        calls.run(1, [x.data_ptr(), out.data_ptr() + 1])
    with pytest.raises(ValueError, match="threads must be from 1"):
        calls.run(0, [x.data_ptr(), out.data_ptr()])
    with pytest.raises(TypeError):
        calls.run(1, [x.data_ptr(), -1])
    calls.run(1, [x.data_ptr(), memory[2].data_ptr()])
    assert memory[2].tolist() == [2.0] * 4


def test_a_recording_looks_at_pieces(recorded):
    calls, _memory = recorded
    with pytest.raises(ValueError, match="a piece's address must be the address of a tensor"):
        calls.move([(0, 16)])
    for bytes_ in (2**63, 2**64 - 1):
        with pytest.raises(OverflowError, match="a piece must be memory that there is"):
            calls.move([(4096, bytes_)])
    calls.move([(0, 0)])  # Of a tensor without elements.


def test_a_recording_says_what_its_calls_use(extension):
    memory, fields = sums()
    places = [each.data_ptr() for each in memory]
    with extension.Recording() as calls:
        extension.channel_sums(1, **fields)
        extension.channel_sums(1, **{**fields, "g": (places[2], 4, 4, 4), "out": places[0]})
    assert calls.move([(place, 16) for place in places]) == ([(0, 1)] * 3, 0)
    assert calls.move([(places[0], 16), (places[2] + 4, 12)]) == ([(0, 1), (2, 0)], 4)
    assert calls.move([]) == ([], 6)


def test_weights_are_packed_again_where_it_is_asked_for(extension):
    engine, threads = "fma", 1
    if engine not in extension.conv_engines():
        pytest.skip("no such engine here")
    weight = torch.randn(16, 16)
    tiles = torch.zeros(extension.conv_pack_bytes(engine, 16, 1, 16), dtype=torch.uint8)
    fields = dict(
        weight=(weight.data_ptr(), 2), scale=None, out=tiles.data_ptr(), c_out=16, kernel=1,
        c_in=16, stride_o=16, stride_h=16, stride_w=16, stride_i=1, transposed=0, dtype=2,
    )  # fmt: skip
    for packs in (False, True):
        with extension.Recording(packs) as calls:
            extension.conv_pack(threads, engine, **fields)
        assert len(calls) == packs
    calls.move([])
    expected = tiles.clone()
    tiles.zero_()
    calls.run(threads, [])
    assert torch.equal(tiles, expected)


def test_a_recording_is_not_used_while_it_records(extension, recorded):
    calls, memory = recorded
    addresses = [memory[0].data_ptr(), memory[2].data_ptr()]
    with calls:
        for use in (lambda: calls.run(1, addresses), lambda: calls.move([])):
            with pytest.raises(RuntimeError, match="one thread at a time"):
                use()
        found = []
        thread = threading.Thread(target=lambda: found.append(raised(calls.__enter__)))
        thread.start()
        thread.join()
        assert "one thread at a time" in found[0]
    with pytest.raises(RuntimeError, match="this thread does not record this"):
        calls.__exit__(None, None, None)
    calls.run(1, addresses)


def raised(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_recording_that_nobody_holds_is_kept_while_it_records(extension):
    said = run_python(
        """
import gc
from tests.csrc.test_binding import sums
from vovnet_fast.backends import _extension
extension = _extension.load("cpu")
memory, fields = sums()
extension.Recording().__enter__()
gc.collect()
others = [extension.Recording() for _ in range(100)]
for _ in range(1000): extension.channel_sums(1, **fields)
assert not any(len(other) for other in others)
hollow = extension.Recording.__new__(extension.Recording)
for use in (hollow.__len__, lambda: hollow.run(1, []), lambda: hollow.move([]), hollow.__enter__):
    try: use()
    except (TypeError, RuntimeError): pass
"""
    )
    assert said.returncode == 0, said.stderr[-3000:]
