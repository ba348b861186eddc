"""Gates and the pool behind them, which a recording makes one call of: the same bits as by two."""

import pytest
import torch

from tests.backends.cpu_engines import instruction_set
from tests.backends.test_cpu_backend import threads
from tests.extension_cases import require
from vovnet_fast._dtypes import accumulator
from vovnet_fast.backends import _extension, cpu
from vovnet_fast.backends._extension import shapes
from vovnet_fast.backends.cpu import recording

SHAPES = [
    (1, 3, 3, 5), (1, 4, 9, 16), (2, 7, 18, 40), (3, 16, 11, 112), (1, 33, 32, 64), (5, 6, 6, 300),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def isa(request):
    if request.param not in ("baseline", *_extension.load("cpu").isas()):
        pytest.skip("not on this processor")
    with instruction_set(request.param):
        yield request.param


def slot(n, h, w, c, dtype):
    """A slot of a buffer whose other channels, and an image before it, are NaN."""
    buffer = torch.full((n + 1, h, w, c + 24), torch.nan, dtype=dtype)
    view = buffer[1:, ..., 8 : 8 + c]
    view.copy_(torch.randn(n, h, w, c))
    return buffer, view


class Pair:
    """Gates of a shape, and their pool, in memory of their own."""

    def __init__(self, shape, dtype, mode, *, gated=True, added=False, in_place=False):
        n, h, w, c = shape
        self.mode = mode
        (_, self.z), (self.around, self.y) = slot(*shape, dtype), slot(*shape, dtype)
        if in_place:
            self.y = self.z
        self.gates = torch.rand(n, c, dtype=accumulator(dtype)) if gated else None
        self.identity = slot(*shape, dtype)[1] if added or not gated else None
        self.around_pooled, self.pooled = slot(n, *shapes.pooled(h, w, mode), c, dtype)
        self.given = self.z.clone()

    def run(self):
        cpu.apply_gates(self.z, self.gates, self.identity, self.y)
        cpu.max_pool(self.y, self.pooled, self.mode)

    def again(self, calls):
        """What the calls leave in memory that has been spoiled, on inputs that are as they were."""
        self.y.fill_(torch.nan)
        self.pooled.fill_(torch.nan)
        self.z.copy_(self.given)
        calls.move([])
        calls.run(torch.get_num_threads(), [])
        return self.y.clone(), self.pooled.clone()


@pytest.mark.parametrize("mode", ["ceil", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_bits_by_one_call(isa, dtype, mode):
    for shape in SHAPES:
        for options in (
            {},
            {"added": True},
            {"gated": False},
            {"in_place": True},
            {"in_place": True, "added": True},
        ):
            pair = Pair(shape, dtype, mode, **options)
            _, found = recording.record(pair.run)
            assert len(found.calls) == 1
            expected = pair.y.clone(), pair.pooled.clone()
            for count in (1, 2, 3, 7):
                with threads(count):
                    again = pair.again(found.calls)
                    for got, wanted in zip(again, expected, strict=True):
                        assert torch.equal(got, wanted), (shape, options, count)
            assert torch.isnan(pair.around[0]).all()
            assert torch.isnan(pair.around_pooled[0]).all()
            assert torch.isnan(pair.around_pooled[..., :8]).all()
            assert torch.isnan(pair.around_pooled[..., 8 + shape[-1] :]).all()


def test_on_other_addresses():
    """All memory is elsewhere when the calls are made again."""
    shape = (2, 9, 10, 32)
    pair, other = (Pair(shape, torch.float32, "ceil", added=True) for _ in range(2))
    _, found = recording.record(pair.run)
    other.run()
    expected = other.y.clone(), other.pooled.clone()
    other.y.fill_(torch.nan)
    other.pooled.fill_(torch.nan)
    pieces = ("z", "gates", "identity", "y", "pooled")
    uses, elsewhere = found.calls.move([recording.extent(getattr(pair, p)) for p in pieces])
    assert (uses, elsewhere) == ([(0, 0)] * len(pieces), 0)
    found.calls.run(2, [getattr(other, piece).data_ptr() for piece in pieces])
    assert torch.equal(other.y, expected[0])
    assert torch.equal(other.pooled, expected[1])


def test_what_stays_two_calls():
    """Where the pool takes something else, keeps winners, or writes over what the gates read."""
    shape = n, h, w, c = 1, 8, 8, 16
    pair = Pair(shape, torch.float32, "ceil")
    size = shapes.pooled(h, w, "ceil")
    room = torch.randn(n, h, w, c)
    pooled_over_room = room.flatten()[: size[0] * size[1] * c].view(1, *size, c)
    over_gates = torch.rand(n * size[0] * size[1] * c).view(1, *size, c)
    argmax = torch.empty(n, *size, c, dtype=torch.uint8)
    z, gates, y, pooled = pair.z, pair.gates, pair.y, pair.pooled
    kinds = {
        "another input": (z, gates, None, y, room, pooled, None),
        "some of its rows": (z, gates, None, y, y[:, :7], pooled[:, :3], None),
        "some of its channels": (z, gates, None, y, y[..., :8], pooled[..., :8], None),
        "winners": (z, gates, None, y, y, pooled, argmax),
        "over z": (room, gates, None, y, y, pooled_over_room, None),
        "over the identity": (z, gates, room, y, y, pooled_over_room, None),
        "over the gates": (z, over_gates.flatten()[:c].view(1, c), None, y, y, over_gates, None),
    }
    for kind, (z, gates, identity, y, x, out, argmax) in kinds.items():

        def work(z=z, gates=gates, identity=identity, y=y, x=x, out=out, argmax=argmax):
            cpu.apply_gates(z, gates, identity, y)
            cpu.max_pool(x, out, "ceil", argmax)

        assert len(recording.record(work)[1].calls) == 2, kind


def test_nothing_to_pool():
    """Of an empty batch nothing is asked."""
    pair = Pair((0, 8, 8, 16), torch.float32, "ceil")
    _, found = recording.record(pair.run)
    assert len(found.calls) == 2
    found.calls.move([])
    found.calls.run(2, [])
