"""Memory in huge pages: what it is, and that it goes when nobody needs it."""

import gc
import threading
import weakref

import pytest
import torch

from vovnet_fast import _pages as pages

MANY = 3 * pages.HUGE


def test_large_memory_begins_with_a_page():
    if pages._madvise() is None:
        pytest.skip("this system knows no advice")
    memory = pages.aligned(MANY)
    assert (memory.numel(), memory.dtype) == (MANY, torch.uint8)
    assert memory.data_ptr() % pages.HUGE == 0
    memory.fill_(7)
    assert int(memory.to(torch.int64).sum()) == 7 * MANY


@pytest.mark.parametrize("size", [0, 1, 63, 1000, 3 * pages.HUGE, 5 * pages.HUGE])
def test_parts_do_not_overlap(size):
    parts = [pages.together(size) for _ in range(20)]
    for i, part in enumerate(parts):
        assert part.numel() == size
        assert part.data_ptr() % 64 == 0
        part.fill_(i)
    assert all(bool((part == i).all()) for i, part in enumerate(parts))


def test_they_lie_together():
    if pages._madvise() is None:
        pytest.skip("this system knows no advice")
    parts = [pages.together(1000) for _ in range(100)]
    roots = {part.untyped_storage().data_ptr() for part in parts}
    assert len(roots) <= 2


def test_memory_goes_with_the_last_part(monkeypatch):
    monkeypatch.setattr(pages, "_current", None)  # Something else may live in it.
    parts = [pages.together(pages.HUGE) for _ in range(20)]
    slabs = [weakref.ref(part._slab) for part in parts if hasattr(part, "_slab")]
    del parts
    gc.collect()
    assert all(slab() is None for slab in slabs)


def test_threads_get_parts_of_their_own():
    found = []

    def work():
        found.extend(pages.together(1000) for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({part.data_ptr() for part in found}) == 800


def test_advice_leaves_what_is_there():
    x = torch.arange(MANY, dtype=torch.float32)
    assert pages.advise(x) is x
    assert torch.equal(x, torch.arange(MANY, dtype=torch.float32))
    pages.advise(torch.empty(MANY, device="meta"))


def test_what_is_kept_is_a_copy():
    for x in (torch.randn(3, 5, 7), torch.randint(-9, 9, (40, 40), dtype=torch.int16)):
        found = pages.kept(x)
        assert torch.equal(found, x)
        assert found.data_ptr() != x.data_ptr()
