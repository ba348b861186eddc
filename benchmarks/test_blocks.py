"""One OSA block, forward and backward, by every backend, eager and torch.compile.

``pytest benchmarks/test_blocks.py --benchmark-only`` (``-m "slow or not slow"`` for torch.compile
as well). The first and, where there is one, the second block of each stage of V-99, whose blocks
V-39 has too, in bf16 at 800x1344 and 640x1600 on a GPU; one block in fp32 on a CPU. Forward is
inference; backward is that of training with fixed statistics, for gradients of input and
parameters. ``extra_info["parts"]`` says where the time goes (:mod:`benchmarks.parts`).
"""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vovnet_fast import backends, specs, use_backend
from vovnet_fast.network.blocks import OSABlock
from vovnet_fast.ops import conv, osa
from vovnet_fast.ops.features import sizes
from vovnet_fast.ops.memory import Memory

from . import parts
from .op_rows import COMPILED, EAGER, check, providers, skip_unless_usable
from .timing import measure, warm_ms

TRAINS = True
"""conftest.py: not in inference mode, in which nothing could be kept for a backward pass."""

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SPEC = "V-99-eSE" if ON_GPU else "V-39-eSE"
SHAPES = ((1, 800, 1344), (1, 640, 1600)) if ON_GPU else ((1, 128, 128),)
SETTINGS = {
    EAGER: "plain modules, channels_last, in the dtype",
    COMPILED: "torch.compile of eager, mode max-autotune-no-cudagraphs",
}


class Case(NamedTuple):
    """A block, and N, C, H, W of its input."""

    plan: specs.BlockPlan
    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        n, c, h, w = self.shape
        identity = " + identity" if self.plan.identity else ""
        return f"OSA block {c}>{self.plan.out_channels}{identity} on {n}x{h}x{w}"

    @property
    def flop(self) -> int:
        """Of a forward pass, two a multiply-add."""
        p, pixels = self.plan, self.shape[0] * self.shape[2] * self.shape[3]
        layers = p.in_channels * p.mid_channels + (p.num_layers - 1) * p.mid_channels**2
        return 2 * pixels * (9 * layers + p.concat_channels * p.out_channels)

    def bytes(self, direction: str) -> int:
        """Of the concat buffer and the output, each convolution's operands once.

        Backward: of the gradients as well, and what they are made of.
        """
        p, pixels = self.plan, self.shape[0] * self.shape[2] * self.shape[3]
        layers = p.in_channels + (2 * p.num_layers - 1) * p.mid_channels
        tail = p.concat_channels + p.out_channels * (3 + p.identity)
        once = (layers + tail) * pixels * DTYPE.itemsize
        # The input and the weight gradient read g, the latter the input; dgrad adds in place.
        return once if direction == "forward" else 3 * once


def _cases():
    spec = specs.get(SPEC)
    found = {}
    for shape in SHAPES:
        maps = sizes(spec, *shape[1:])
        for plan in spec.blocks():
            if plan.index <= (2 if ON_GPU else 1) and (ON_GPU or plan.stage == 2):
                size = maps[f"stage{plan.stage}"]
                case = Case(plan, (shape[0], plan.in_channels, *size))
                found[case.name] = case
    return found


CASES = _cases()


class Block:
    """A block, its input and a gradient of its output, for eager and the backends."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            block: Any = OSABlock(case.plan, "hard_sigmoid", False, None, False)
        for parameter in block.parameters():  # As after training, and not as the constructor left.
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
        self.module = block.to(dtype=DTYPE, memory_format=torch.channels_last).eval()
        n, c, h, w = case.shape
        options = dict(dtype=DTYPE, device=device)
        self.x = torch.randn(n, h, w, c, **options).permute(0, 3, 1, 2)
        self.dout = torch.randn(n, h, w, case.plan.out_channels, **options).permute(0, 3, 1, 2)
        with torch.no_grad():
            self.params = _packed(self.module.fold(DTYPE))

    def forward(self, module) -> Tensor:
        with torch.no_grad(), use_backend("reference"):
            out: Tensor = module(self.x)
        return out.permute(0, 2, 3, 1)

    def backward(self, module):
        """A function that takes ``dout`` back through a graph that is kept."""
        x = self.x.detach().requires_grad_()
        with use_backend("reference"):
            out = module(x)
        wanted = [x, *self.module.parameters()]

        def run() -> Tensor:
            dx = torch.autograd.grad(out, wanted, self.dout, retain_graph=True)[0]
            return dx.permute(0, 2, 3, 1)

        return run

    def forward_by(self, backend) -> Tensor:
        return self.kept(backend)[0]

    def kept(self, backend):
        """The output, and what is kept for the backward pass. The input is in its slot."""
        with torch.no_grad():
            n, c, h, w = self.dout.shape
            out = self.x.new_empty(n, h, w, c)
            return out, osa.run(backend, self._buffer, self.params, out, Memory())

    @functools.cached_property
    def _buffer(self) -> Tensor:
        x = self.x.permute(0, 2, 3, 1)
        buffer = x.new_empty(*x.shape[:3], self.params.width)
        osa.input_slot(buffer, self.params).copy_(x)
        return buffer

    def backward_by(self, backend, kept) -> Tensor:
        with torch.no_grad():
            grads = osa.run_backward(
                backend, self.dout.permute(0, 2, 3, 1), self.params, kept,
                need_x=True, wanted=[True] * len(self.params.convs()),
            )  # fmt: skip
        return grads.x


def _packed(params):
    """With weights as the backends take them."""
    layers = [conv.pack(layer, DTYPE) for layer in params.convs()]
    reduced = params.reduction is not None
    return params._replace(
        layers=tuple(layers[1 if reduced else 0 : -1]),
        concat=layers[-1],
        reduction=layers[0] if reduced else None,
    )


def _works(block, provider, direction, module):
    """What is measured, eager's, and the function that a listening backend is given."""
    eager = (
        functools.partial(block.forward, block.module)
        if direction == "forward"
        else block.backward(block.module)
    )
    if provider == EAGER:
        return eager, eager, None
    if provider == COMPILED:
        if direction == "forward":
            return functools.partial(block.forward, module), eager, None
        return block.backward(module), eager, None
    backend = backends._module(provider)
    run = block.forward_by
    if direction == "backward":
        run = functools.partial(block.backward_by, kept=block.kept(backend)[1])
    return functools.partial(run, backend), eager, run


@pytest.mark.parametrize("provider", providers())
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_block(name, direction, provider, benchmark, watch, device, ceilings):
    skip_unless_usable(provider, device)
    module = None
    case = CASES[name]
    block = Block(case, device)
    if provider == COMPILED:
        if not ON_GPU:
            pytest.skip("max-autotune is for GPUs")
        module = torch.compile(block.module, mode="max-autotune-no-cudagraphs", dynamic=False)
    work, eager, run = _works(block, provider, direction, module)
    flop = case.flop * (1 if direction == "forward" else 2)
    moved = case.bytes(direction)
    backend = provider if provider in backends.NAMES else None
    benchmark.group = f"{name} {direction}"
    benchmark.extra_info.update(
        kind="block",
        name=name if direction == "forward" else f"{name} backward",
        provider=provider,
        backend=backend,
        dtype=str(DTYPE).removeprefix("torch."),
        shape="x".join(map(str, case.shape)),
        flop=flop,
        bytes=moved,
        settings=SETTINGS.get(provider, "in one concat buffer, weights packed before"),
    )
    benchmark.extra_info["pass"] = direction
    benchmark.extra_info["distance"] = check(work(), eager(), DTYPE, times=10)
    found = measure(benchmark, watch, work, eager, seconds=1.0)
    benchmark.extra_info["warm_ms"] = warm_ms(watch, work, 0.2)
    seconds = found.median_ms / 1e3
    benchmark.extra_info.update(ceilings.fractions(flop, moved, seconds, DTYPE))
    if backend is not None:
        benchmark.extra_info["parts"] = parts.of_backend(watch, run, backends._module(backend))
    elif provider == EAGER:
        benchmark.extra_info["parts"] = parts.of_eager(watch, eager)
