"""The two ceilings that all other rows are held against: a large copy, a large multiplication.

``extra_info`` has the rate of the fastest of the calls that were measured for the whole
session (``gbs``, ``tflops``), and the times of all of them.
"""

import pytest
import torch

from vovnet_fast.tools.bench.stopwatch import spread

from .ceilings import COPY, Ceilings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", Ceilings.names(DEVICE))
def test_ceiling(name, benchmark, ceilings):
    found = ceilings[name]
    benchmark.group = "ceilings"
    benchmark.extra_info.update(
        kind="ceiling",
        name=found.name,
        provider="torch",
        dtype=None if name == COPY else name,
        flop=found.flop,
        bytes=found.moved,
        **spread(found.times),
        **found.rates(),
    )
    benchmark.pedantic(found.work, rounds=3, warmup_rounds=1)
