"""The Hopper convolution on a simulated GPU, for the tests of it.

The simulator (conv_sm90_simulator.h) runs the kernel's own source: what it copies, waits for,
multiplies and stores. It cannot see what instructions cost, nor whether they are encoded right:
test_conv_sm90_code.py looks at what nvcc makes of it.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vovnet_fast
from vovnet_fast import specs
from vovnet_fast.backends import conv_sm90, conv_sm90_tiles

ROOT = Path(vovnet_fast.__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda" / "conv_sm90"
GUARD = 16
CHANNELS = [64, 80, 96, 112, 128, 160, 192, 224, 256]
DTYPES = [torch.float16, torch.bfloat16]
SMALL = [(1, 25, 42), (2, 25, 42), (6, 10, 25)]  # The last stage of 800x1344, and of 320x800.

with_sources = pytest.mark.skipif(
    not SOURCES.exists(), reason="the sources of the extension are not here, only the package"
)

# --------------------------------------------------------------------------------------
# The simulator
# --------------------------------------------------------------------------------------


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (f"stride_{axis}", ctypes.c_int64) for axis in ("n", "h", "w")
    ]


class Params(ctypes.Structure):
    """ConvSm90Params."""

    _fields_ = [
        *((name, View) for name in ("x", "out", "add", "mask")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "shift", "pool_partials")),
        *(
            (name, ctypes.c_int64)
            for name in ("n", "height", "width", "c_in", "c_out", "add_c", "mask_c")
        ),
        *((name, ctypes.c_int32) for name in ("kernel", "tile_h", "tile_w", "block_out")),
        *((name, ctypes.c_int32) for name in ("cluster_pixels", "cluster_channels", "parts")),
        *((name, ctypes.c_int32) for name in ("turns", "relu", "dtype")),
    ]


def struct(fields):
    views = {name: View() for name in ("add", "mask") if fields[name] is None}
    given = {k: View(*v) if isinstance(v, tuple) else v for k, v in fields.items()}
    return Params(**given | views)


class Simulator:
    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def struct(self, fields):
        return struct(fields)

    def call(self, function, *args):
        error = ctypes.create_string_buffer(1000)
        failed = getattr(self.library, function)(*args, error, len(error))
        assert not failed, error.value.decode()

    def run(
        self, fields, *, ctas=2, late_copies=True, late_products=True, ahead=0, multiplied=0, seed=0
    ):
        """Returns the bytes that copies fetched.

        Before the first store `ahead` of them are asked for, and `multiplied` WGMMAs issued.
        """
        params, fetched = ctypes.byref(self.struct(fields)), ctypes.c_int64()
        before = (ctypes.c_int64(ahead), ctypes.c_int64(multiplied))
        timing = (int(late_copies), int(late_products), *before, seed)
        self.call("conv_sm90_simulate", params, ctas, *timing, ctypes.byref(fetched))
        return fetched.value

    def plan(self, fields):
        """Stages of strips and of weights, and bytes of shared memory."""
        numbers = (ctypes.c_int * 3)()
        self.call("conv_sm90_plan", ctypes.byref(self.struct(fields)), numbers)
        return tuple(numbers)


def build(source, library):
    """Compile a simulator, a file of this folder."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++ or g++) on PATH")
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    found = subprocess.run(
        [*command, "-o", str(library), str(Path(__file__).with_name(source))],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-4000:]


# --------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------


def slot(shape, dtype, device, *, crop=False):
    """A NaN-filled buffer, and a view inside it that is surrounded by NaN on all sides."""
    n, h, w, c = shape
    edge = int(crop)
    size = (n, h + 2 * edge, w + 2 * edge, c + 2 * GUARD)
    buffer = torch.full(size, float("nan"), dtype=dtype, device=device)
    return buffer, buffer[:, edge : edge + h, edge : edge + w, GUARD : GUARD + c]


class Layer:
    """Arguments of one call, in slots, and what it should compute."""

    def __init__(self, n, h, w, c_in, c_out, *, kernel=3, dtype=torch.float16, crop=False,
                 relu=True, device="cpu"):  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        _, self.x = slot((n, h, w, c_in), dtype, device, crop=crop)
        self.x.copy_(randn(n, h, w, c_in))
        self.weight = (randn(c_out, kernel, kernel, c_in) / (kernel * kernel * c_in) ** 0.5).to(
            dtype
        )
        self.scale, self.shift = randn(c_out), randn(c_out)
        self.buffer, self.out = slot((n, h, w, c_out), dtype, device, crop=crop)
        self.before = self.buffer.clone()
        self.relu = relu

    @property
    def tensors(self):
        return self.x, self.weight, self.scale, self.shift, self.out

    def beside(self, c):
        """Of the same pixels, as wide as asked for, in a slot of its own."""
        generator = torch.Generator().manual_seed(c)
        _, view = slot((*self.out.shape[:3], c), self.x.dtype, self.x.device)
        return view.copy_(torch.randn(view.shape, generator=generator).to(self.x.device))

    def exact(self, dtype=torch.float64):
        x, weight = (t.to(dtype).permute(0, 3, 1, 2) for t in (self.x, self.weight))
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2).permute(0, 2, 3, 1)
        y = y * self.scale.to(dtype) + self.shift.to(dtype)
        return F.relu(y) if self.relu else y

    def gradient(self, add=None, mask=None):
        """What it computes as the gradient of an input."""
        x, weight = (t.double().permute(0, 3, 1, 2) for t in (self.x, self.weight))
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2).permute(0, 2, 3, 1)
        if add is not None:
            y[..., : add.shape[3]] += add.double()
        if mask is not None:
            y[..., y.shape[3] - mask.shape[3] :] *= ~(mask <= 0)
        return y

    def plan(self, config, **beside):
        x, weight, scale, shift, out = self.tensors
        if beside:
            scale = shift = None
        return conv_sm90.plan(config, x, weight, scale, shift, out, relu=self.relu, **beside)

    def check(self, partials=None, exact=None):
        """One rounding of what is stored, and a few of sums; nothing else is touched.

        Sums are those of fp32; tensor cores cut what they add, where fp32 rounds.
        """
        exact, simulated = self.exact() if exact is None else exact, not self.x.is_cuda
        slack = 2e-5 if simulated else 1e-3
        error = (self.out.double() - exact).abs()
        unit = torch.finfo(self.out.dtype).eps / 2
        excess = (error - unit * 1.01 * exact.abs() - slack).max().item()
        assert excess <= 0, f"error up to {error.max().item():.3g}, {excess:.3g} too much"
        if partials is not None:
            sums = exact.sum((1, 2))
            rtol = 1e-5 if simulated else 1e-4
            torch.testing.assert_close(partials.sum(1).double(), sums, rtol=rtol, atol=1e-2)
        rest = self.before.as_strided(self.out.shape, self.out.stride(), self.out.storage_offset())
        rest.copy_(self.out)
        assert torch.equal(self.buffer.view(torch.int16), self.before.view(torch.int16)), (
            "it wrote outside its slot"
        )


def by_themselves(*words):
    """Tiles without clusters, which have tests of their own."""
    return [config for config in conv_sm90.configs(*words) if config.cluster == (1, 1)]


def simulate(simulator, layer, config, *, pool=False, **timing):
    launch = layer.plan(config)
    partials, pointer = None, None
    if pool:
        shape = (layer.x.shape[0], launch.tiles, layer.weight.shape[0])
        partials = torch.full(shape, float("nan"))
        pointer = partials.data_ptr()
    fetched = simulator.run(dict(launch.fields, pool_partials=pointer), **timing)
    layer.check(partials)
    n, h, w, c_in, c_out = (launch.fields[k] for k in ("n", "height", "width", "c_in", "c_out"))
    shape = conv_sm90_tiles.Shape(n, h, w, c_in, c_out, launch.fields["kernel"], pool)
    assert fetched == conv_sm90_tiles.work(config, shape, timing.get("ctas", 2)).fetched


def simulate_gradient(simulator, layer, config, add, mask, **timing):
    exact = layer.gradient(add, mask)
    launch = layer.plan(config, add=add, mask=mask)
    assert launch.fields["scale"] is None
    simulator.run(dict(launch.fields, pool_partials=None), **timing)
    layer.check(exact=exact)


def last_stage(network):
    """C_in, C_out and kernel of the layers of the last stage, and of their inputs' gradients."""
    found = set()
    for block in specs.get(network).blocks():
        if block.stage == 5:
            mids, concat = block.mid_channels, block.concat_channels
            found |= {
                (block.in_channels, mids, 3),
                (mids, mids, 3),
                (concat, block.out_channels, 1),
            }
    return sorted(found | {(c_out, c_in, kernel) for c_in, c_out, kernel in found})
