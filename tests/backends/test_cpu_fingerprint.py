"""Fingerprints of memory: the same for the same bytes, another one for any others."""

import pytest
import torch

from tests.extension_cases import require
from vovnet_fast.backends import _extension
from vovnet_fast.replay import fingerprint

SIZES = (1, 7, 8, 63, 64, 65, 1023, 1024, 1025, 4096, 65536, 65537, 200_003)
"""Bytes, around those of a word, a stripe, a block and a chunk."""


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


def of(*tensors, threads=2):
    pieces = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
    return _extension.load("cpu").fingerprint(threads, pieces)


def noise(size):
    return torch.randint(0, 256, (size,), dtype=torch.uint8)


@pytest.fixture
def instruction_sets():
    extension = _extension.load("cpu")
    best = extension.isa()
    yield extension.isas()
    extension.use_isa(best)


@pytest.mark.parametrize("size", SIZES)
def test_it_depends_on_the_bytes_alone(size, instruction_sets):
    """Not on threads, instruction set, or where they lie."""
    data, found = noise(size), set()
    for isa in instruction_sets:
        _extension.load("cpu").use_isa(isa)
        found |= {of(data, threads=threads) for threads in (1, 2, 5)}
        for offset in (1, 3, 8):
            moved = torch.zeros(size + offset, dtype=torch.uint8)
            moved[offset:] = data
            found.add(of(moved[offset:]))
    assert len(found) == 1
    first, second = found.pop()
    assert first != second
    assert max(first, second) < 2**64


@pytest.mark.parametrize("size", SIZES)
def test_any_bit_counts(size):
    data = noise(size)
    found = {of(data)}
    places = [*torch.randperm(size)[:60].tolist(), 0, size - 1]
    flipped = {(place, bit) for place in places for bit in (0, 3, 7)}
    for place, bit in flipped:
        data[place] ^= 1 << bit
        found.add(of(data))
        data[place] ^= 1 << bit
    assert len(found) == 1 + len(flipped)
    assert len({first for first, _ in found}) == len({second for _, second in found}) == len(found)
    assert of(data) in found


def test_every_bit_of_a_few_words_counts_and_every_two_of_them():
    found = {of(torch.zeros(24, dtype=torch.uint8))}
    for i in range(192):
        for j in range(i):
            data = torch.zeros(24, dtype=torch.uint8)
            data[i // 8] = 1 << i % 8
            data[j // 8] += 1 << j % 8
            found.add(of(data))
    assert len(found) == 1 + 192 * 191 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_changes_places_is_seen(dtype):
    """Elements, rows, and tensors; zero and its negative are different, and so is NaN."""
    weight = torch.randn(40, 3, 3, 24).to(dtype)
    before = of(weight)
    seen = {before}
    flat = weight.view(-1)
    for _ in range(200):
        i, j = torch.randint(0, flat.numel(), (2,)).tolist()
        if flat[i] == flat[j]:
            continue
        flat[[i, j]] = flat[[j, i]]
        found = of(weight)
        assert found not in seen
        seen.add(found)
    for axis in range(4):
        assert of(weight.flip(axis).contiguous()) not in seen
        assert of(weight.roll(1, axis).contiguous()) not in seen
    other = torch.randn_like(weight)
    assert of(weight, other) != of(other, weight)
    assert of(weight) != of(weight * 1.01)
    zeros = torch.zeros(100, dtype=dtype)
    assert len({of(zeros), of(-zeros), of(zeros / 0)}) == 3


def test_what_two_words_gain_and_lose_is_seen():
    """In one lane of a block, so that sums which know no places would stay as they are."""
    data = torch.randint(-(2**60), 2**60, (128,))
    found = {of(data)}
    for row in range(1, 16):
        for difference in (1, 2**20, 2**40, -(2**59)):
            changed = data.clone()
            changed[0] += difference
            changed[8 * row] -= difference
            found.add(of(changed))
            swapped = data.clone()
            swapped[[0, 8 * row]] = swapped[[8 * row, 0]]
            found.add(of(swapped))
    assert len(found) == 1 + 15 * 5


def test_sizes_and_borders_count():
    zeros = [torch.zeros(size, dtype=torch.uint8) for size in range(300)]
    assert len({of(t) for t in zeros}) == len(zeros)
    data = noise(100_000)
    borders = {of(data[:i], data[i:]) for i in (1, 8, 64, 1024, 65_536, 99_999)}
    assert len(borders | {of(data)}) == 7
    assert len({of(), of(data[:0]), of(data[:0], data[:0])}) == 3


def test_what_it_is_given_is_looked_at():
    extension, data = _extension.load("cpu"), noise(64)
    for threads, pieces in (
        (0, [(data.data_ptr(), 64)]),
        (5000, [(data.data_ptr(), 64)]),
        (1, [(0, 64)]),
        (1, [(8, 64)]),
        (1, [(data.data_ptr(), -1)]),
    ):
        with pytest.raises(ValueError, match="must be"):
            extension.fingerprint(threads, pieces)
    for pieces in ([(data.data_ptr(), 2**50)], [(2**64 - 4096, 8192)]):
        with pytest.raises(OverflowError):
            extension.fingerprint(1, pieces)
    for pieces in ([(None, 1)], [(1.5, 2)], [1], None, [(data.data_ptr(),)]):
        with pytest.raises(TypeError):
            extension.fingerprint(1, pieces)


def views():
    data = torch.randn(6, 8, 4, 4)
    return {
        "contiguous": (data, True),
        "channels_last": (data.contiguous(memory_format=torch.channels_last), True),
        "transposed": (data.permute(2, 0, 3, 1), True),
        "one": (data[:1, :1, :1, :1], True),
        "empty": (data[:0], True),
        "slice": (data[:, 2:5], False),
        "steps": (data[..., ::2], False),
        "expanded": (data[:1].expand(6, 8, 4, 4), False),
        "negative": (torch._neg_view(data), False),
        "twice": (data.as_strided((4, 4), (1, 2)), False),
    }


@pytest.mark.parametrize("name", views())
def test_all_elements_of_a_view_count_and_nothing_else(name):
    view, dense = views()[name]
    tensors = [None, view, torch.ones(3)]

    def look():
        places = fingerprint.places(tensors)
        found = fingerprint.layout(tensors, places)
        assert found.loose == ([] if dense else [1])
        return fingerprint.content(tensors, found)

    before = look()
    assert look() == before
    if view.numel() and name != "expanded":
        for index in ((0,) * view.dim(), tuple(size - 1 for size in view.shape)):
            old = view[index].clone()
            view[index] = old + 1
            assert look() != before
            view[index] = old
    assert look() == before
    if name == "slice":
        view._base[:, 0] += 1
        assert look() == before


def test_tensors_without_memory_here_are_not_looked_at():
    for other in (torch.empty(3, device="meta"), torch.eye(3).to_sparse()):
        tensors = [torch.ones(1), other]
        places = fingerprint.places(tensors)
        assert places is None or fingerprint.layout(tensors, places) is None


def test_tensors_that_count_no_versions_are_read_all_the_same():
    with torch.inference_mode():
        uncounted = torch.ones(3)
    tensors = [None, uncounted, torch.ones(2)]
    before = fingerprint.places(tensors)
    assert [place and place[1] for place in before] == [None, None, 0]
    layout = fingerprint.layout(tensors, before)
    content = fingerprint.content(tensors, layout)
    with torch.inference_mode():
        uncounted.add_(1)
    assert fingerprint.places(tensors) == before
    assert fingerprint.content(tensors, layout) != content
