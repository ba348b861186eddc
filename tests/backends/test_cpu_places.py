"""Where what lies between recorded calls lies in the memory that is lent."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from vovnet_fast.backends.cpu import recording, repeats

_pieces = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 20), st.integers(0, 20)), max_size=30
)


@settings(deadline=None)
@given(_pieces)
def test_pieces_in_use_at_the_same_time_lie_apart(pieces):
    sizes = [size for size, _, _ in pieces]
    uses = [(first, first + calls) for _, first, calls in pieces]
    offsets, total = repeats._places(sizes, uses)
    for i, (size, (first, last)) in enumerate(zip(sizes, uses)):
        assert offsets[i] % 64 == 0
        assert offsets[i] + size <= total
        for j in range(i):
            if uses[j][0] <= last and first <= uses[j][1] and size and sizes[j]:
                assert offsets[j] + sizes[j] <= offsets[i] or offsets[i] + size <= offsets[j]
    by_call = (sum(s for s, u in zip(sizes, uses) if u[0] <= t <= u[1]) for t in range(41))
    assert max(by_call, default=0) <= total <= sum(-(-size // 64) * 64 for size in sizes)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 10)), max_size=8))
def test_overlaps_are_seen(extents):
    used = [set(range(first, first + size)) for first, size in extents]
    expected = any(a & b for i, a in enumerate(used) for b in used[:i])
    assert recording.overlap(extents) == expected
