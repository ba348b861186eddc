"""Every function of the Triton backend on sizes by chance, forward and backward, against fp64.

The calls are those of the self-check (:mod:`vovnet_fast.selfcheck`), with other layers and maps:
odd, narrow, of a single pixel, with channels that fill no tile. On a GPU each seed draws others, in
every dtype; the interpreter takes one seed of small ones in fp32.
"""

import functools
import random

import pytest
import torch

from vovnet_fast import selfcheck

ON_GPU = torch.cuda.is_available()
SEEDS = range(8 if ON_GPU else 1)
DTYPES = selfcheck.DTYPES if ON_GPU else (torch.float32,)
SIDE, CHANNELS = (40, 256) if ON_GPU else (6, 48)
"""The largest that are drawn."""

SIZED = [case for case in selfcheck.CASES if {"layer", "shape"} & set(case.call.keywords)]
FUNCTIONS = sorted({case.function for case in SIZED})


def drawn(case, chance):
    """The case with a layer or a map of another size."""
    given = dict(case.call.keywords)
    n, h, w = chance.randint(1, 3), chance.randint(1, SIDE), chance.randint(1, SIDE)
    if "shape" in given:
        least = 2 if "mode" in given else 1  # A pool without padding has no window in one pixel.
        given["shape"] = (n, max(h, least), max(w, least), channels(chance))
    else:
        layer = given["layer"]
        c_in, c_out = channels(chance), channels(chance)
        if layer.c_in == 3:
            c_in = 3
        elif layer.kernel == 1:  # Of a concat buffer, whose identity is the first channels.
            c_in = c_out + channels(chance)
        given["layer"] = layer._replace(c_in=c_in, c_out=c_out, size=(n, h, w))
        if "masked" in given:
            given["masked"] = 8 * chance.randint(1, (c_in - c_out) // 8)
    found = given.get("shape") or given["layer"]
    call = functools.partial(case.call.func, *case.call.args, **given)
    return case._replace(words=f"{found}", call=call)


def channels(chance):
    """Multiples of eight, as all published widths are."""
    return 8 * chance.randint(1, CHANNELS // 8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_sizes_by_chance(function, seed, device, monkeypatch):
    chance = random.Random(f"{function} {seed}")
    candidates = [case for case in SIZED if case.function == function]
    cases = tuple(drawn(case, chance) for case in candidates)
    if not ON_GPU:
        cases = cases[:1]
    monkeypatch.setitem(selfcheck.run.__globals__, "CASES", cases)
    rows = selfcheck.run("triton", device, DTYPES)
    assert len(rows) == len(cases) * len(DTYPES)
    for row in rows:
        assert row.passed, row


def test_what_is_drawn_is_not_what_the_self_check_has():
    chance = random.Random(0)
    found = {drawn(case, chance).words for case in SIZED for _ in range(3)}
    assert len(found) > len(SIZED)
    assert not found & {case.words for case in selfcheck.CASES}
