"""Frozen networks on a GPU: arenas of the Triton backend, CUDA graphs."""

import copy

import pytest
import torch

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends
from vovnet_fast.compat import zip
from vovnet_fast.deploy.freeze import KEPT_SHAPES, freeze

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if backends.why_not(request.param, torch.device("cuda")) is not None:
        pytest.skip("this backend cannot run on this GPU")
    with backends.use_backend(request.param):
        yield request.param


def network(name):
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(TINY[name])).cuda().eval()


def image(side=64):
    return torch.randn(2, 3, side, side + 32, device="cuda", dtype=torch.float16)


@torch.no_grad()
def assert_no_worse_than_eager(found, model, x):
    """Error against fp64 at most twice that of eager in fp16."""
    with backends.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
        in_eager = copy.deepcopy(model).half()(x)
    for ours, theirs, right in zip(found, in_eager, expected, strict=True):
        error, allowed = ((f.double() - right).norm() for f in (ours, theirs))
        assert error <= 2 * allowed


def assert_near(found, expected):
    """As near as two algorithms of cuDNN are in TF32 or fp16."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01 * b.abs().max().item())


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", list(TINY))
def test_equals_eager_and_keeps_results(name, graph, backend):
    """With interleaved shapes: what an earlier call returned is not overwritten."""
    model = network(name)
    frozen = freeze(model, torch.float16, graph=graph)
    kept = []
    for side in (64, 96, 64, 96):
        x = image(side)
        found = frozen(x)
        kept.append((x, found, [f.clone() for f in found]))
    for x, found, copies in kept:
        assert all(map(torch.equal, found, copies))
        assert_no_worse_than_eager(found, model, x)


@pytest.mark.parametrize("graph", [False, True])
def test_a_repeated_call_allocates_little_but_the_features(graph, backend):
    if backend == "reference" and not graph:
        pytest.skip("PyTorch's own path allocates as it goes")
    frozen, x = freeze(network("detectron2"), torch.float16, graph=graph), image(256)
    for _ in range(2):
        found = frozen(x)
    needed = sum(f.nbytes for f in found)
    del found
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    features = frozen(x)
    assert sum(f.nbytes for f in features) == needed
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * needed


def test_streams_share_no_memory(backend):
    """Calls on several streams at once, with and without graphs."""
    model = network("detectron2")
    images = [image(128) for _ in range(3)]
    for graph in (False, True):
        frozen = freeze(model, torch.float16, graph=graph)
        alone = [frozen(x) for x in images]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in images]
        for _ in range(10):
            together = []
            for stream, x in zip(streams, images, strict=True):
                with torch.cuda.stream(stream):
                    together.append(frozen(x))
            torch.cuda.synchronize()
            for a, b in zip(alone, together, strict=True):
                assert_near(b, a)


def test_graphs_follow_the_weights_and_are_bounded():
    frozen, other = (freeze(network("detectron2"), graph=True) for _ in range(2))
    with torch.no_grad():
        for buffer in other.state_dict().values():
            buffer.mul_(0.9)
    x = image().float()
    frozen(x)
    for assign in (False, True):
        frozen.load_state_dict(other.state_dict(), assign=assign)
        assert_near(frozen(x), other(x))
    for i in range(KEPT_SHAPES + 2):
        frozen(image(64 + 2 * i))
    assert len(frozen._caches.graphs._kept) == KEPT_SHAPES


@torch.no_grad()
def test_inside_a_graph_of_the_caller(backend):
    model, x = network("detectron2"), image()
    frozen = freeze(model, torch.float16, graph=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        frozen(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = frozen(x)
    x.copy_(image())
    graph.replay()
    assert_no_worse_than_eager(found, model, x)
