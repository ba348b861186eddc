"""vovnet_fast.tools.memory and ``vovnet-fast bench --memory``: what training keeps."""

import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.fused import fused
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, compat
from vovnet_fast.compat import zip
from vovnet_fast.tools import cli
from vovnet_fast.tools.memory import MODES, training_memory

pytestmark = pytest.mark.skipif(
    compat.TORCH < (2, 7), reason="tensors without memory cannot be checkpointed"
)

SHAPE = (2, 96, 64)


def kept(spec, **options):
    """Bytes by mode."""
    return {row.mode: row.kept for row in training_memory(spec, SHAPE, **options).rows}


class Allocations(TorchDispatchMode):
    """Notes every storage that comes out of an operation, and keeps none alive."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self, given):
        """Bytes of those that still exist, without those of the tensors in ``given``."""
        own = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        return sum(n for ref, n in self.sizes.items() if ref not in own and not ref.expired())


def bytes_alive(spec, mode, *, norm_eval):
    """Bytes that a forward pass leaves behind by whatever way, its results left out."""
    model = VoVNet(TINY[spec], norm_eval=norm_eval, with_cp=mode.with_cp)
    x = torch.zeros(SHAPE[0], 3, *SHAPE[1:])
    model = model.to(dtype=torch.bfloat16, memory_format=torch.channels_last).train()
    x = x.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    allocations = Allocations()
    with fused(watched=False) if mode.fused else backends.use_backend("reference"), allocations:
        features = model(x)
    # Of nodes above: up to torch 2.11 a Function's own, held in Python, does not keep the graph.
    nodes = [feature.view_as(feature).grad_fn for feature in features]
    del features
    found = allocations.alive([x, *model.parameters(), *model.buffers()])
    del nodes
    left = allocations.alive([x, *model.parameters(), *model.buffers()])
    assert left == 0, "something outlives the graph"
    return found


@pytest.mark.parametrize("norm_eval", [True, False])
@pytest.mark.parametrize(
    "name",
    [pytest.param("depthwise", marks=pytest.mark.versions), *sorted({*TINY} - {"depthwise"})],
)
def test_nothing_is_held_beside_what_is_counted(name, norm_eval):
    """Not on the contexts of Functions, nor anywhere else; on real tensors, not on meta ones."""
    counted = kept(TINY[name], norm_eval=norm_eval)
    for label, mode in MODES.items():
        found = bytes_alive(name, mode, norm_eval=norm_eval)
        # For meta tensors PyTorch's batch norm saves a few numbers a channel more.
        slack = 0 if mode.fused else 0.01
        assert found == pytest.approx(counted[label], rel=slack), label


class _Hoarder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x * 2
        return x + 1

    @staticmethod
    def backward(ctx, dout):
        return dout


def test_what_a_context_hides_is_found():
    """The test before this one could fail."""
    x = torch.zeros(100, requires_grad=True)
    with Allocations() as allocations:
        node = _Hoarder.apply(x).grad_fn
    assert allocations.alive([x]) == 400
    del node
    assert allocations.alive([x]) == 0


@pytest.mark.parametrize("name", ["detectron2", "depthwise"])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_the_kernels_keep_what_the_reference_does(name, norm_eval, monkeypatch):
    """The same ops with the Triton backend, whose launches are noted and not run."""
    pytest.importorskip("triton", minversion="3.6")
    from vovnet_fast.kernels._common import recording

    counted = kept(TINY[name], norm_eval=norm_eval)
    monkeypatch.setattr(backends, "select", lambda *_: "triton")
    with recording() as launches:
        assert kept(TINY[name], norm_eval=norm_eval) == counted
    assert launches


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fused_blocks_by_hand(dtype):
    """The concat buffers, the 1x1s' outputs, the stem's outputs and a byte a pooled pixel."""
    spec, (batch, height, width) = TINY["detectron2"], SHAPE
    size = 2 if dtype == "bf16" else 4
    pixels = [batch * height * width // 4**i for i in range(6)]
    stem = spec.stem_channels  # Its last output is slot 0 of the first buffer.
    expected = size * (pixels[1] * stem[0] + pixels[1] * stem[1])
    pooled = {}
    for block in spec.blocks():
        expected += size * pixels[block.stage] * (block.concat_channels + block.out_channels)
        pooled.setdefault(block.stage, pixels[block.stage] * block.in_channels)
    expected += sum(count for stage, count in pooled.items() if stage > 2)
    found = kept(spec, dtype=dtype)["fused"]
    assert expected <= found <= 1.05 * expected  # Scales, shifts and gates are the rest.


@pytest.mark.parametrize("spec", ["V-39-eSE", "V-99-eSE"])
def test_networks_at_full_size(spec):
    """Six images of 640x1600, which no test machine could compute, take seconds."""
    memory = training_memory(spec, (6, 640, 1600))
    ratios = {row.mode: memory.ratio(row) for row in memory.rows}
    assert memory.rows[0].kept > 5e9
    assert ratios["eager"] == 1
    assert ratios["fused"] < 0.42
    assert ratios["fused, recompute"] < 0.6 * ratios["eager, checkpoint"]
    assert all(row.kept == sum(row.stages.values()) and row.peak is None for row in memory.rows)
    assert all(size > 0 for row in memory.rows for size in row.stages.values())


def test_batch_size_and_dtype_scale_it():
    once, twice = (training_memory("V-19-slim-dw-eSE", (n, 64, 64)) for n in (4, 8))
    high = training_memory("V-19-slim-dw-eSE", (4, 64, 64), dtype="fp32")
    for a, b, c in zip(once.rows, twice.rows, high.rows, strict=True):
        assert 1.8 * a.kept < b.kept < 2.01 * a.kept
        assert 1.5 * a.kept < c.kept < 2.01 * a.kept


def test_other_backends_by_environment_change_nothing(monkeypatch):
    expected = kept(TINY["detectron2"])
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "reference")
    assert kept(TINY["detectron2"]) == expected
    assert backends.chosen() == "reference"


def run(capsys, *words):
    status = cli.main(["bench", *words])
    return status, capsys.readouterr()


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, printed = run(capsys, "--memory", "V-19-slim-dw-eSE", "2x64x96")
    assert status == 0
    lines = printed.out.splitlines()
    assert all(mode in printed.out for mode in MODES)
    assert [line.split()[0] for line in lines if line.startswith(" stage")] == [
        f"stage{i}" for i in range(2, 6)
    ]
    assert "…" not in printed.out
    assert "nothing has run" in " ".join(printed.out.split())
    ratios = next(line for line in lines if line.startswith(" of eager")).split()[2:]
    eager, _, ours, least = map(float, ratios)
    assert eager == 1
    assert 0 < least < ours < 0.5


def test_the_command_in_json(capsys):
    words = ("V-19-slim-dw-eSE", "2x64x96", "--json", "--dtype", "fp16")
    found = json.loads(run(capsys, "--memory", *words)[1].out)
    assert found["shape"] == [2, 64, 96]
    assert found["dtype"] == "fp16"
    assert found["norm_eval"] is True
    assert [row["mode"] for row in found["rows"]] == list(MODES)
    for row in found["rows"]:
        assert row["kept"] == sum(row["stages"].values())
        assert row["ratio_to_eager"] == row["kept"] / found["rows"][0]["kept"]
        assert row["peak"] is None
    batch = json.loads(run(capsys, "--memory", *words, "--no-norm-eval")[1].out)
    assert batch["norm_eval"] is False
    assert batch["rows"][2]["kept"] != found["rows"][2]["kept"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "V-38-eSE", "1x64x64"], "unknown VoVNet 'V-38-eSE': did you mean"),
        (["--memory", "V-39-eSE", "64x64"], "an input is written NxHxW"),
        (["--memory", "V-39-eSE", "1x8x8"], "is too small"),
        (["--memory", "V-39-eSE", "1x64x64", "--peak-tflops", "9"], "--peak-tflops belongs to"),
        (["--plan", "V-39-eSE", "1x64x64", "--measure"], "--measure belongs to --memory"),
        (["--plan", "V-39-eSE", "1x64x64", "--no-norm-eval"], "--norm-eval belongs to --memory"),
    ],
)
def test_the_command_refuses(capsys, words, message):
    status, printed = run(capsys, *words)
    assert status == 1
    assert message in printed.err
    assert not printed.out


def test_peaks_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: "torch sees no NVIDIA GPU")
    status, printed = run(capsys, "--memory", "V-39-eSE", "1x64x64", "--measure")
    assert status == 1
    assert "torch sees no NVIDIA GPU. Without --measure bytes are counted" in printed.err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("norm_eval", [True, False])
def test_measured_peaks(norm_eval):
    """Between what is kept and what eager needs, beyond what the gradients take."""
    memory = training_memory("V-39-eSE", (4, 256, 256), norm_eval=norm_eval, measure=True)
    peaks = {row.mode: row.peak for row in memory.rows}
    assert memory.device == torch.cuda.get_device_name()
    assert all(row.peak > row.kept for row in memory.rows)
    assert peaks["fused"] < 0.7 * peaks["eager"]
    assert peaks["fused, recompute"] < peaks["fused"]
