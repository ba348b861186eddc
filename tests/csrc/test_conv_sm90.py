"""The Hopper convolution: its kernel on a simulated GPU, and on a GPU.

The simulator (conv_sm90_simulator.h) runs the kernel's own source: what it copies, waits for,
multiplies and stores. It cannot see what instructions cost, nor whether they are encoded right:
test_conv_sm90_code.py looks at what nvcc makes of it.
"""

import ctypes
import itertools
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vovnet_fast
from vovnet_fast import selfcheck, specs, tuning
from vovnet_fast.backends import (
    _cuda_conv,
    conv_sm90,
    conv_sm90_tiles,
    conv_sm90_trial,
    conv_sm90_verdict,
    cuda,
    reference,
)

ROOT = Path(vovnet_fast.__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda" / "conv_sm90"
GUARD = 16
CHANNELS = [64, 80, 96, 112, 128, 160, 192, 224, 256]
DTYPES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(
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


@pytest.fixture(scope="session")
def simulator(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++ or g++) on PATH")
    library = tmp_path_factory.mktemp("conv_sm90") / "simulator.so"
    source = Path(__file__).with_name("conv_sm90_simulator.cpp")
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    found = subprocess.run(
        [*command, "-o", str(library), str(source)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return Simulator(library)


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


# --------------------------------------------------------------------------------------
# Numbers, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("c_out", CHANNELS)
def test_3x3_is_right(c_out, simulator):
    for config in by_themselves(c_out):
        simulate(simulator, Layer(1, 9, 11, 72, c_out), config)


@pytest.mark.parametrize("c_out", CHANNELS)
def test_1x1_with_pool_partials_is_right(c_out, simulator):
    for config in by_themselves(c_out, 1):
        simulate(simulator, Layer(2, 9, 17, 80, c_out, kernel=1), config, pool=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c_in", [8, 16, 40, 64, 160])
def test_every_number_of_input_channels(c_in, dtype, simulator):
    """Down to chunks of one, two and three steps; what lies beside a slot is NaN."""
    for kernel in (1, 3):
        layer = Layer(1, 5, 7, c_in, 80, kernel=kernel, dtype=dtype)
        simulate(simulator, layer, conv_sm90.Config(128, 80), pool=True)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (16, 33)])
def test_odd_sizes(size, kernel, simulator):
    for crop in (False, True):  # Cropped rows do not follow each other.
        layer = Layer(2, *size, 24, 64, kernel=kernel, crop=crop)
        simulate(simulator, layer, conv_sm90.Config(128, 64), pool=True)


def test_weights_stay_where_they_have_room(simulator):
    """They are fetched by the first tile of a CTA alone."""
    config = conv_sm90.Config(256, 64)
    for c_in, resident in ((64, True), (72, False)):
        for ctas in (1, 3):
            layer = Layer(2, 17, 40, c_in, 64)
            shape = conv_sm90_tiles.Shape(2, 17, 40, c_in, 64, 3)
            assert conv_sm90_tiles.work(config, shape, ctas).resident == resident
            for late in (False, True):  # What is fetched is compared there.
                simulate(simulator, layer, config, ctas=ctas, late_copies=late)


def test_several_blocks_of_channels_share_a_tile(simulator):
    simulate(simulator, Layer(2, 9, 9, 16, 320), conv_sm90.Config(256, 160), ctas=3, pool=True)


@pytest.mark.parametrize("slots", [(768, 192), (1024, 224), (4096, 80)])
def test_1x1_over_a_concat_buffer(slots, simulator):
    """All of a block's slots at once, each of its own magnitude, in many more steps than stages.

    Against sums over one slot after the other: products that are lost, or another slot's, show.
    """
    first, width = slots
    widths = [first] + [width] * 5
    for config in [*conv_sm90.configs(256)[:1], conv_sm90.Config(128, 128, (1, 2))]:
        layer = Layer(1, 9, 29, sum(widths), 256, kernel=1)
        for i, slot in enumerate(layer.x.split(widths, dim=3)):
            slot.mul_(2.0**-i)
        simulate(simulator, layer, config, pool=True, ctas=1)
        x, weight = (t.double().split(widths, dim=3) for t in (layer.x, layer.weight))
        z = sum(x @ w.flatten(1).T for x, w in zip(x, weight))
        exact = F.relu(z * layer.scale.double() + layer.shift.double())
        torch.testing.assert_close(layer.out.double(), exact, rtol=6e-4, atol=2e-5)


def test_the_last_block_of_channels_may_be_short(simulator):
    """Of the widths that gradients of concat buffers have; what lies beyond is left alone."""
    for c_out in (72, 152, 328):
        for config in by_themselves(c_out):
            assert c_out % config.block_out
            for kernel in (1, 3):
                simulate(simulator, Layer(1, 9, 15, 24, c_out, kernel=kernel), config, pool=True)
            layer = Layer(1, 9, 15, 24, c_out)
            simulate_gradient(simulator, layer, config, layer.beside(c_out), layer.beside(c_out))


# --------------------------------------------------------------------------------------
# Gradients of inputs, on the simulator
# --------------------------------------------------------------------------------------


def simulate_gradient(simulator, layer, config, add, mask, **timing):
    exact = layer.gradient(add, mask)
    launch = layer.plan(config, add=add, mask=mask)
    assert launch.fields["scale"] is None
    simulator.run(dict(launch.fields, pool_partials=None), **timing)
    layer.check(exact=exact)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("c_out", CHANNELS)
def test_input_gradient_is_right(c_out, kernel, simulator):
    for config in by_themselves(c_out):
        layer = Layer(1, 9, 11, 72, c_out, kernel=kernel)
        simulate_gradient(simulator, layer, config, layer.beside(c_out), layer.beside(c_out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("add_c", "mask_c"), [(0, 0), (80, 0), (24, 0), (0, 80), (40, 56)])
def test_what_is_added_and_what_masks(add_c, mask_c, dtype, simulator):
    for size, crop in (((5, 9), False), ((17, 9), True)):
        layer = Layer(2, *size, 24, 80, dtype=dtype, crop=crop)
        add, mask = (layer.beside(c) if c else None for c in (add_c, mask_c))
        if mask is not None:
            mask[0, 0, 0, :2] = torch.tensor([float("nan"), 0.0])
        simulate_gradient(simulator, layer, conv_sm90.Config(128, 80), add, mask, ctas=3)


def test_what_is_added_may_be_the_output(simulator):
    layer = Layer(2, 9, 33, 24, 320)
    add = layer.out.copy_(layer.beside(320))[..., :160]
    simulate_gradient(simulator, layer, conv_sm90.Config(128, 160), add, layer.beside(320))


def test_it_is_the_gradient_of_autograd(simulator):
    """Through the weights as backends pack them: scaled, transposed and flipped."""
    weight = torch.randn(96, 3, 3, 80, dtype=torch.float64)
    scale = torch.rand(96, dtype=torch.float64)
    layer = Layer(1, 9, 11, 96, 80)
    packed = (weight * scale[:, None, None, None]).permute(3, 1, 2, 0).flip(1, 2)
    layer.weight = packed.contiguous().half()
    x = torch.zeros(1, 80, 9, 11, dtype=torch.float64, requires_grad=True)
    filters = layer.weight.double().permute(3, 1, 2, 0).flip(1, 2)
    F.conv2d(x, filters.permute(0, 3, 1, 2), padding=1).backward(
        layer.x.double().permute(0, 3, 1, 2)
    )
    launch = layer.plan(conv_sm90.Config(128, 80), add=None)
    simulator.run(dict(launch.fields, pool_partials=None))
    layer.check(exact=x.grad.permute(0, 2, 3, 1))


# --------------------------------------------------------------------------------------
# The rest, on the simulator
# --------------------------------------------------------------------------------------


def test_without_relu(simulator):
    simulate(simulator, Layer(1, 4, 8, 16, 80, relu=False), conv_sm90.Config(128, 80))


@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_and_inf_go_where_they_go_in_torch(kernel, simulator):
    layer = Layer(1, 8, 16, 16, 64, kernel=kernel)
    layer.x[0, 2, 3, 5], layer.x[0, 6, 9, 0] = float("nan"), float("inf")
    launch = layer.plan(conv_sm90.Config(128, 64))
    simulator.run(dict(launch.fields, pool_partials=None))
    exact = layer.exact()
    assert torch.equal(layer.out.isnan(), exact.isnan())
    assert torch.equal(layer.out.isposinf(), exact.isposinf())


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_rings_hold_whatever_the_timing(late_copies, late_products, kernel, simulator):
    """Many tiles for one CTA: every stage is used again and again, also across tiles."""
    simulate(
        simulator, Layer(1, 17, 24, 136 if kernel == 3 else 456, 128, kernel=kernel),
        conv_sm90.Config(128, 64), pool=True, ctas=1,
        late_copies=late_copies, late_products=late_products,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2])
def test_the_next_tile_is_fetched_under_an_epilogue(parts, simulator):
    """As much as the rings hold, while nothing of the tile is stored; not a stage more."""
    layer = Layer(1, 16, 16, 512, 128)
    fields = dict(layer.plan(conv_sm90.Config(128, 128, parts=parts)).fields, pool_partials=None)
    strips, weights, _ = simulator.plan(fields)
    assert strips < 24 // parts, "the next tile has more stages than the rings"
    assert weights < 72 // parts, "the next tile has more stages than the rings"
    strip, tap = 18 * 8 * 128, 128 * 128
    first = 24 * strip + 72 * tap  # All parts of the first tile together.
    full = first + parts * (strips * strip + weights * tap)
    simulator.run(fields, ctas=parts, ahead=full)
    layer.check()
    layer.out.fill_(float("nan"))
    with pytest.raises(AssertionError, match="copies under an epilogue"):
        simulator.run(fields, ctas=parts, ahead=full + 1)


# --------------------------------------------------------------------------------------
# Clusters, on the simulator
# --------------------------------------------------------------------------------------


CLUSTERS = [(2, 1), (1, 2), (2, 2), (1, 3), (4, 2)]


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("cluster", CLUSTERS[:3])
def test_what_a_cluster_shares_arrives_at_all(cluster, late_copies, late_products, simulator):
    """However early or late, and at one of them before it arrives at another."""
    for kernel, c_in in ((3, 136), (1, 456)):
        layer = Layer(1, 17, 24, c_in, 256, kernel=kernel)
        simulate(
            simulator, layer, conv_sm90.Config(128, 64, cluster), pool=True, ctas=1, seed=kernel,
            late_copies=late_copies, late_products=late_products,
        )  # fmt: skip


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_may_reach_beyond_the_image_and_the_channels(cluster, simulator):
    """Nine tiles, of pixels and of channels, are no multiple of any cluster but one."""
    for kernel in (1, 3):
        layer = Layer(3, 20, 17, 24, 192, kernel=kernel)
        simulate(simulator, layer, conv_sm90.Config(128, 64, cluster), pool=True, ctas=8)
    add, mask = layer.beside(192), layer.beside(192)
    simulate_gradient(simulator, layer, conv_sm90.Config(128, 64, cluster), add, mask)


def test_a_cluster_shares_weights_that_stay(simulator):
    config = conv_sm90.Config(128, 64, (2, 1))
    shape = conv_sm90_tiles.Shape(2, 17, 40, 64, 64, 3)
    assert conv_sm90_tiles.work(config, shape, 4).resident
    for late in (False, True):
        simulate(simulator, Layer(2, 17, 40, 64, 64), config, ctas=4, late_copies=late)


# --------------------------------------------------------------------------------------
# Warpgroups that take turns, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_turns_hold_whatever_the_timing(late_copies, late_products, kernel, simulator):
    """Six tiles for one CTA, with more stages than the rings, and, of few channels, with fewer."""
    for c_in in (136, 24) if kernel == 3 else (712, 24):
        simulate(
            simulator, Layer(1, 17, 24, c_in, 96, kernel=kernel),
            conv_sm90.Config(128, 96, turns=True), pool=True, ctas=1, seed=c_in,
            late_copies=late_copies, late_products=late_products,
        )  # fmt: skip


@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_any_number_of_tiles_in_turns(tiles, simulator):
    """Of a single one the second warpgroup has nothing, of an odd number one less."""
    for kernel in (1, 3):
        layer = Layer(tiles, 7, 11, 72, 64, kernel=kernel)
        simulate(simulator, layer, conv_sm90.Config(128, 64, turns=True), pool=True, ctas=1)


def test_weights_stay_for_both_that_take_turns(simulator):
    config = conv_sm90.Config(128, 64, turns=True)
    shape = conv_sm90_tiles.Shape(2, 17, 40, 64, 64, 3)
    assert conv_sm90_tiles.work(config, shape, 3).resident
    for late in (False, True):
        simulate(simulator, Layer(2, 17, 40, 64, 64), config, ctas=3, late_copies=late)


@pytest.mark.parametrize("cluster", CLUSTERS[:4])
def test_clusters_whose_warpgroups_take_turns(cluster, simulator):
    """What CTAs share is read by whichever warpgroup of each; at any timing, and beyond the map."""
    config = conv_sm90.Config(128, 64, cluster, turns=True)
    for kernel, late in ((1, True), (3, False)):
        layer = Layer(3, 20, 17, 136, 192, kernel=kernel)
        simulate(
            simulator, layer, config, pool=True, ctas=4, seed=kernel, late_copies=late,
            late_products=not late,
        )  # fmt: skip
    add, mask = layer.beside(192), layer.beside(192)
    simulate_gradient(simulator, layer, config, add, mask, ctas=4)


def test_the_next_tile_is_multiplied_under_an_epilogue(simulator):
    """All of it, while nothing of the first is stored, in turns; where both share it nothing."""
    layer = Layer(1, 16, 24, 136, 96)
    each = 9 * (4 + 4 + 1) * 2  # Taps, steps of three chunks, and blocks of 64 pixels.
    for config, most in [
        (conv_sm90.Config(128, 96, turns=True), 2 * each),
        (conv_sm90.Config(128, 96), each),
    ]:
        fields = dict(layer.plan(config).fields, pool_partials=None)
        for late in (False, True):
            layer.out.fill_(float("nan"))
            simulator.run(fields, ctas=1, multiplied=most, late_products=late)
            layer.check()
            with pytest.raises(AssertionError, match="products under an epilogue"):
                simulator.run(fields, ctas=1, multiplied=most + 1, late_products=late)


# --------------------------------------------------------------------------------------
# Tiles whose sum CTAs of a cluster share, on the simulator
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c_out", "tile"),
    [(64, (256, 64)), (80, (128, 80)), (96, (256, 96)), (112, (128, 112)), (128, (256, 128)),
     (160, (128, 160)), (192, (128, 192)), (224, (128, 224))],
)  # fmt: skip
def test_parts_of_every_width_add_up(c_out, tile, simulator):
    """Eighteen terms in five parts: parts end within columns, of which both fetch a strip."""
    config = conv_sm90.Config(*tile, parts=5)
    simulate(simulator, Layer(1, 9, 11, 72, c_out), config, pool=True, ctas=5)


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("late_products", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_add_up_whatever_the_timing(parts, late_copies, late_products, simulator):
    """Several tiles one after the other: what is handed over takes the same place again."""
    for kernel, c_in in ((3, 72), (1, 520)):
        layer = Layer(1, 17, 24, c_in, 128, kernel=kernel)
        simulate(
            simulator, layer, conv_sm90.Config(128, 64, parts=parts), pool=True, ctas=parts,
            seed=parts, late_copies=late_copies, late_products=late_products,
        )  # fmt: skip


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (16, 33)])
def test_odd_sizes_in_parts(size, kernel, simulator):
    for crop in (False, True):
        layer = Layer(2, *size, 24 if kernel == 3 else 136, 64, kernel=kernel, crop=crop)
        simulate(simulator, layer, conv_sm90.Config(128, 64, parts=3), pool=True, ctas=6)


@pytest.mark.parametrize(("cluster", "parts"), [((2, 1), 4), ((1, 2), 3), ((2, 2), 2), ((1, 4), 2)])
def test_parts_of_several_tiles(cluster, parts, simulator):
    """CTAs of a part share what they fetch; clusters reach beyond the image and the channels."""
    for kernel, c_in in ((3, 24), (1, 264)):
        layer = Layer(3, 20, 17, c_in, 192, kernel=kernel)
        config = conv_sm90.Config(128, 64, cluster, parts)
        simulate(simulator, layer, config, pool=True, ctas=8, seed=kernel)
    add, mask = layer.beside(192), layer.beside(192)
    simulate_gradient(simulator, layer, config, add, mask, ctas=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("add_c", "mask_c"), [(0, 0), (80, 0), (24, 0), (0, 80), (40, 56)])
def test_what_is_added_in_parts_and_what_masks(add_c, mask_c, dtype, simulator):
    layer = Layer(2, 17, 9, 24, 80, dtype=dtype, crop=True)
    add, mask = (layer.beside(c) if c else None for c in (add_c, mask_c))
    if mask is not None:
        mask[0, 0, 0, :2] = torch.tensor([float("nan"), 0.0])
    simulate_gradient(simulator, layer, conv_sm90.Config(256, 80, parts=4), add, mask, ctas=8)


def test_the_last_block_in_parts_may_be_short(simulator):
    layer = Layer(1, 9, 15, 24, 328, relu=False)
    config = conv_sm90.Config(128, 112, parts=3)
    simulate(simulator, layer, config, pool=True, ctas=6)
    simulate_gradient(simulator, layer, config, layer.beside(328), layer.beside(328), ctas=6)


def test_parts_are_added_in_their_order(simulator):
    """Of numbers that no other order of fp32 sums gives, by whichever part, at any timing."""
    layer = Layer(1, 9, 15, 256, 64, kernel=1, relu=False)
    layer.x.zero_()
    layer.x[..., ::64] = 1
    layer.weight.zero_()
    # Only where the first two are added first is anything left of the others.
    terms = torch.tensor([2.0**15, -(2.0**15), 0.5**15, 0.5**15])
    layer.weight[:, 0, 0, ::64] = terms.half()
    layer.scale.fill_(1), layer.shift.fill_(0)
    for seed in range(3):
        for late in (False, True):
            launch = layer.plan(conv_sm90.Config(128, 64, parts=4))
            fields = dict(launch.fields, pool_partials=None)
            simulator.run(fields, ctas=4, seed=seed, late_copies=late, late_products=late)
            assert torch.equal(layer.out, torch.full_like(layer.out, 0.5**14))


SMALL = [(1, 25, 42), (2, 25, 42), (6, 10, 25)]  # The last stage of 800x1344, and of 320x800.


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


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("network", ["V-39-eSE", "V-99-eSE"])
def test_small_maps_keep_nine_processors_of_ten_busy(network, size):
    """The first of the splits on offer: CTAs for 132 processors, on average over the waves."""
    n, height, width = size
    found = {}
    for c_in, c_out, kernel in last_stage(network):
        pixels = (height, width) if kernel == 3 else (1, height * width)
        shape = conv_sm90_tiles.Shape(n, *pixels, c_in, c_out, kernel, True)
        on_offer = (*conv_sm90.configs(c_out, kernel), *conv_sm90_tiles.splits(shape, 132))
        best = max(on_offer, key=lambda c: conv_sm90_tiles.useful(c, shape, 132))
        found[c_in, c_out, kernel] = conv_sm90_tiles.work(best, shape, 132).busy
    assert min(found.values()) >= 0.9, found


def test_24_tiles_in_five_parts_are_120_ctas():
    shape = conv_sm90_tiles.Shape(1, 25, 42, 224, 224, 3)
    config = conv_sm90_tiles.splits(shape, 132)[0]
    assert config == conv_sm90.Config(128, 112, parts=5)
    found = conv_sm90_tiles.work(config, shape, 132)
    assert (found.tiles, round(found.busy * 132)) == (24, 120)
    # Of 36 taps of chunks a part has 7 or 8, and those of the last chunk are half as long.
    assert found.even == pytest.approx(126 / (5 * 28))
    without = max(conv_sm90_tiles.work(c, shape, 132).busy for c in conv_sm90.configs(224))
    assert without == pytest.approx(24 / 132)


def test_splits_are_on_offer_for_small_maps_alone(simulator):
    """And all of them have room in shared memory, and a name that says which they are."""
    large = conv_sm90_tiles.Shape(1, 200, 336, 128, 128, 3)
    assert conv_sm90_tiles.splits(large, 132) == ()
    for size in SMALL:
        for c_in, c_out, kernel in last_stage("V-99-eSE"):
            n, height, width = size
            pixels = (height, width) if kernel == 3 else (1, height * width)
            shape = conv_sm90_tiles.Shape(n, *pixels, c_in, c_out, kernel, True)
            found = conv_sm90_tiles.splits(shape, 132)
            assert len(found) <= conv_sm90_tiles.SPLITS
            for config in found:
                assert config.name.startswith(conv_sm90.SPLIT)
                assert conv_sm90.config_of(config.name, c_out, kernel) == config
                layer = Layer(*size, c_in, c_out, kernel=kernel)
                fields = dict(layer.plan(config).fields, pool_partials=1)
                strips, weights, taken = simulator.plan(fields)
                assert (strips >= 2, weights >= 3, taken <= 226 << 10) == (True,) * 3, config
    assert conv_sm90.config_of("conv-sm90 split 9 128x112", 224, 3) is None


def test_names_of_splits():
    assert conv_sm90.Config(128, 112, parts=5).name == "conv-sm90 split 5 128x112"
    assert conv_sm90.Config(128, 96, (2, 1), 4).name == "conv-sm90 split 4 128x96 cluster 2x1"


# --------------------------------------------------------------------------------------
# What is taken, and how
# --------------------------------------------------------------------------------------


def test_every_tile_fits_into_shared_memory_with_room_to_run_ahead(simulator):
    for c_out in CHANNELS:
        for config in conv_sm90.configs(c_out):
            for kernel, (h, w) in [(3, (25, 42)), (3, (200, 336)), (3, (9, 400)), (1, (50, 84))]:
                layer = Layer(1, h, w, 8, c_out, kernel=kernel)
                fields = dict(layer.plan(config).fields, pool_partials=1, c_in=4096)
                strips, weights, size = simulator.plan(fields)
                assert size <= 226 << 10, (config, kernel)
                assert strips >= 2, (config, kernel, strips)
                assert weights >= 3, (config, kernel, weights)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(kernel=5), "kernel must be 1 or 3, got 5"),
        (dict(dtype=2), "dtype code 2"),
        (dict(c_in=12), "multiple of 8 channels, got 12"),
        (dict(tile_w=4), "no tiles of 16 x 4 pixels"),
        (dict(tile_h=32), "no tiles of 32 x 8 pixels by 256 channels"),
        (dict(block_out=72), "no tiles"),
        (dict(cluster_pixels=9), "no clusters of 9 x 1"),
        (dict(cluster_pixels=3), "no clusters of 3 x 1"),
        (dict(block_out=128, parts=9), "no clusters of 1 x 1 tiles in 9 parts"),
        (dict(block_out=128, parts=3, cluster_pixels=4), "no clusters of 4 x 1 tiles in 3 parts"),
        (dict(block_out=128, parts=2, cluster_channels=3), "no parts of 3 tiles of channels"),
        (dict(block_out=128, kernel=1, parts=2), "2 parts of 1 taps and chunks"),
        (dict(block_out=160, tile_h=32, parts=2), "no parts of tiles of 32 x 8 pixels by 160"),
        (dict(block_out=112, parts=2, turns=1), "no parts of tiles of .* 112 channels in turns"),
        (dict(turns=1), "no tiles of 16 x 8 pixels by 256 channels in turns"),
        (dict(block_out=64, tile_h=32, turns=1), "no tiles of 32 x 8 pixels .* in turns"),
        (dict(c_out=204), "multiple of 8 channels, got 204"),
        (dict(add_c=12), "multiples of 8 channels, got 12 and 0"),
        (dict(add=(40, 4096, 512, 16), add_c=8), "multiples of 16 bytes"),
        (dict(mask=(32, 4096, 512, 12), mask_c=8), "multiples of 16 bytes"),
        (dict(x=(32, 4096, 512, 20)), "multiples of 16 bytes"),
        (dict(out=(40, 4096, 512, 16)), "multiples of 16 bytes"),
        (dict(out=(0, 0, 0, 0)), "multiples of 16 bytes"),
        (dict(n=1 << 25), "2\\^30 tiles"),
    ],
)
def test_what_cannot_be_is_said(wrong, words, simulator):
    fields = dict(
        x=(32, 1 << 20, 1 << 14, 64), out=(32, 1 << 20, 1 << 14, 256), add=None, mask=None,
        weight=32, scale=32, shift=32, pool_partials=None, n=1, height=100, width=100, c_in=64,
        c_out=256, add_c=0, mask_c=0, kernel=3,
        tile_h=16, tile_w=8, block_out=256, cluster_pixels=1, cluster_channels=1, parts=1,
        turns=0, relu=1, dtype=0,
    )  # fmt: skip
    simulator.plan(fields)
    with pytest.raises(AssertionError, match=words):
        simulator.plan({**fields, **wrong})


def test_tiles_follow_the_image():
    config = conv_sm90.Config(256, 160)
    assert config.tile(200, 336, 3) == (16, 16)
    assert config.tile(32, 8, 3) == (32, 8)
    assert config.tile(1, 67200, 1) == (1, 256)


def test_channels_are_padded_only_where_nothing_wide_divides_them():
    for c_out in (*CHANNELS, 320, 384, 448, 512, 768, 1024):
        for config in conv_sm90.configs(c_out):
            assert c_out % config.block_out == 0
    names = [c.name.removeprefix("conv-sm90 ") for c in conv_sm90.configs(224)]
    assert names == [
        "256x112", "256x112 cluster 2x1", "256x112 cluster 2x2",
        "128x224", "128x224 cluster 2x1", "128x224 cluster 4x1",
        "turns 128x112", "turns 128x112 cluster 2x1", "turns 128x112 cluster 4x2",
    ]  # fmt: skip
    for c_out in (1472, 1888, 2144):  # Concat buffers.
        for config in conv_sm90.configs(c_out):
            assert config.block_out >= 160
            assert -c_out % config.block_out < 0.05 * c_out
    assert conv_sm90.configs(56) == conv_sm90.configs(100) == []


def test_refusals_name_what_is_wrong():
    def refused(*shape, stride=1, **options):
        layer = Layer(*shape, **options)
        return conv_sm90.refusal(layer.x, layer.weight, layer.out, stride=stride)

    assert refused(1, 5, 5, 16, 80) is None
    assert refused(1, 1, 1, 16, 80) is None
    assert "float32" in refused(1, 5, 5, 16, 80, dtype=torch.float32)
    assert "stride 2" in refused(1, 5, 5, 16, 80, stride=2)
    assert "56 output channels" in refused(1, 5, 5, 16, 56)
    assert "100 output channels" in refused(1, 5, 5, 16, 100)
    assert "12 input channels" in refused(1, 5, 5, 12, 80)
    layer = Layer(2, 5, 5, 16, 80)
    assert "x does not start" in conv_sm90.refusal(
        layer.x[..., 4:12], layer.weight[..., :8], layer.out
    )
    tensors = (layer.x, layer.weight, layer.out)
    assert "mask does not start" in conv_sm90.refusal(*tensors, mask=layer.out[..., 4:12])
    assert "add has 12 channels" in conv_sm90.refusal(*tensors, add=layer.out[..., :12])
    expanded = layer.x[:1].expand(2, -1, -1, -1)
    assert "x has strides" in conv_sm90.refusal(expanded, layer.weight, layer.out)


# --------------------------------------------------------------------------------------
# The trials that it has to pass on a GPU, on the simulator
# --------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch, simulator):
    """Launches run on the simulator; returns the configurations that ran."""
    ran = []

    def run(config, x, weight, scale, shift, out, *, relu=True, pool=False, **beside):
        launch = conv_sm90.plan(config, x, weight, scale, shift, out, relu=relu, **beside)
        shape = (x.shape[0], launch.tiles, weight.shape[0])
        partials = torch.full(shape, float("nan")) if pool else None
        pointer = None if partials is None else partials.data_ptr()
        simulator.run(dict(launch.fields, pool_partials=pointer), ctas=config.size, seed=len(ran))
        ran.append(config)
        return partials

    monkeypatch.setattr(conv_sm90, "run_config", run)
    return ran


TRIED = conv_sm90_trial.Map((1, 9, 21), {3: 24, 1: 456}, across=2, times=1)


def of_tiles(block=64):
    return conv_sm90_trial.of_tiles(torch.device("cpu"), torch.float16, TRIED, block)


def test_what_is_right_passes_its_trials(simulated):
    trials = list(of_tiles())
    assert len(trials) > 60
    for words, trial in trials[::7]:
        assert trial() is None, words
    ran = {(config.turns, config.parts > 1, config.cluster != (1, 1)) for config in simulated}
    assert len(ran) > 4, ran


@pytest.mark.parametrize("spoil", ["a number", "a sum", "beside"])
def test_what_is_wrong_does_not(spoil, simulated, monkeypatch):
    run = conv_sm90.run_config

    def spoilt(config, x, weight, scale, shift, out, **options):
        partials = run(config, x, weight, scale, shift, out, **options)
        if spoil == "a number":
            out[0, 8, 20, -1] += 8
        elif spoil == "beside":
            out.as_strided((1,), (1,), out.storage_offset() + out.shape[3]).zero_()
        elif partials is not None:
            partials[0, -1, 5] += 100
        return partials

    monkeypatch.setattr(conv_sm90, "run_config", spoilt)
    words, trial = next(of_tiles())
    assert "128x64, 1x1 forward" in words
    assert ("outside its slot" if spoil == "beside" else "error") in trial()


def test_clusters_that_a_gpu_has_no_room_for_are_no_failure(simulated, monkeypatch):
    """But for those of one CTA, and where the error is an earlier launch's."""
    words = "conv_sm90: cannot launch 1 clusters of 8: cudaErrorInvalidClusterSize"
    assert '"cannot launch "' in (SOURCES / "launch.cu").read_text()

    def refused(config, *tensors, **options):
        raise RuntimeError(words)

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(conv_sm90, "run_config", refused)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    trials = dict(itertools.islice(of_tiles(), 5))
    [alone], others = [list(trials.values())[i] for i in (slice(1), slice(1, None))]
    assert [trial() for trial in others] == [None] * 4
    with pytest.raises(RuntimeError, match="cannot launch"):
        alone()
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory"):
        others[0]()
    words = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="illegal memory"):
        others[0]()


def test_every_kernel_has_trials_that_it_can_run(simulator):
    """On the large map the CTAs of any H100 have several tiles each, also of both warpgroups."""
    shared = set()
    for pixels in (conv_sm90_trial.SMALL, conv_sm90_trial.large(132)):
        for block in conv_sm90_tiles.WIDTHS:
            for kernel in (1, 3):
                forms = list(conv_sm90_trial.forms(pixels, block, kernel))
                assert len({config.name for config in forms}) == len(forms)
                alone = {config for config in forms if config.size == 1}
                assert alone == set(conv_sm90_tiles.kernels(block))
                shared |= {block for config in forms if config.parts > 1}
                c_in, c_out = pixels.c_in[kernel], pixels.across * block
                n, h, w = pixels.size
                layer = Layer(1, h, w, c_in, c_out, kernel=kernel)
                for config in forms:
                    fields = layer.plan(config).fields
                    simulator.plan(dict(fields, n=n, pool_partials=1))
                    shape = conv_sm90_tiles.Shape(
                        n, fields["height"], fields["width"], c_in, c_out, kernel
                    )
                    if pixels.times > 1:
                        work = conv_sm90_tiles.work(config, shape, 132)
                        assert work.tiles * config.parts >= 2 * 132, config
    # What parts of the widest would hand over takes the room of the rings.
    assert shared == {*conv_sm90_tiles.WIDTHS} - {256, 224}


def test_the_cuda_backend_measures_it_against_aten(monkeypatch, tmp_path):
    layer, ran = Layer(1, 5, 5, 16, 80), []
    engine = conv_sm90.configs(80)[0].name

    def run(engine, *tensors, relu, pool):
        ran.append(engine)
        return reference.conv(*tensors, relu=relu, pool=pool)

    def aten(*tensors, **options):
        ran.append("aten")
        return reference.conv(*tensors, **options)

    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "may_measure", lambda device: True)
    monkeypatch.setattr(tuning, "_announce", lambda: None)
    monkeypatch.setattr(tuning, "_device_timer", lambda device: lambda run: (run(), 1.0)[1])
    monkeypatch.setattr(conv_sm90, "engines", lambda *args, **kwargs: [engine])
    monkeypatch.setattr(conv_sm90, "run", run)
    monkeypatch.setattr(_cuda_conv, "_ops", lambda: types.SimpleNamespace(conv=aten))
    cuda.conv(*layer.tensors, pool=True)
    assert set(ran) == {"aten", engine}
    torch.testing.assert_close(layer.out.double(), layer.exact(), rtol=1e-2, atol=1e-2)


def test_the_cuda_backend_offers_it_for_gradients_of_inputs(monkeypatch):
    layer, ran, seen = Layer(1, 5, 5, 80, 80), [], []
    engine = conv_sm90.configs(80)[0].name

    def choose(device, problem, candidates, static, run, **options):
        seen.append(candidates)
        return engine

    def run(name, g, packed, scale, shift, out, **options):
        ran.append((name, scale, shift, options))

    ops = types.SimpleNamespace(pack_transposed=lambda weight, scale, out: None)
    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(conv_sm90, "engines", lambda *args, **kwargs: [engine])
    monkeypatch.setattr(conv_sm90, "run", run)
    monkeypatch.setattr(_cuda_conv, "_ops", lambda: ops)
    add, mask = layer.beside(80), layer.beside(80)
    cuda.conv_input_grad(layer.x, layer.weight, None, layer.out, add=add, mask=mask)
    assert "aten" in seen[0]
    assert engine in seen[0]
    assert ran == [(engine, None, None, dict(add=add, mask=mask))]
    # Those of a stride are no convolution of the gradient.
    wide = torch.empty(1, 10, 10, 80, dtype=layer.x.dtype)
    monkeypatch.setattr(
        _cuda_conv, "run_input_grad_engine", lambda name, *args, **kw: ran.append(name)
    )
    cuda.conv_input_grad(layer.x, layer.weight, None, wide, stride=2)
    assert ran[1:] == ["aten"]


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_it_passes_its_trials_in_a_process_of_its_own(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv(conv_sm90.ENVIRONMENT)
    selfcheck.trust._table.cache_clear()
    monkeypatch.setattr(conv_sm90_verdict, "_known", {})
    assert conv_sm90.why_not(gpu) is None
    assert "conv-sm90" in (tmp_path / "verified.json").read_text()
    selfcheck.trust._table.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv(conv_sm90.ENVIRONMENT, "1")
    device = torch.device("cuda")
    reason = conv_sm90.why_not(device)
    if reason is not None:
        pytest.skip(reason)
    return device


def run_all_gradients(layer, add=None, mask=None):
    exact = layer.gradient(add, mask)
    for engine in conv_sm90.engines(layer.x, layer.weight, layer.out, add=add, mask=mask):
        layer.out.fill_(float("nan"))
        x, weight, _, _, out = layer.tensors
        conv_sm90.run(engine, x, weight, None, None, out, add=add, mask=mask)
        layer.check(exact=exact)


def run_all(layer, *, pool=False):
    found = conv_sm90.engines(layer.x, layer.weight, layer.out)
    assert found
    for engine in found:
        layer.out.fill_(float("nan"))
        partials = conv_sm90.run(engine, *layer.tensors, relu=layer.relu, pool=pool)
        layer.check(partials)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("c_out", [*CHANNELS, 320, 512])
def test_gpu_every_number_of_output_channels(c_out, kernel, dtype, gpu):
    for c_in in (8, 80, 160, 224):
        layer = Layer(2, 33, 50, c_in, c_out, kernel=kernel, dtype=dtype, device=gpu)
        run_all(layer, pool=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "c_out"), [(3, 64), (3, 128), (3, 160), (3, 224), (1, 1472)])
def test_gpu_gradients_of_inputs(kernel, c_out, dtype, gpu):
    layer = Layer(2, 33, 50, 160, c_out, kernel=kernel, dtype=dtype, device=gpu)
    run_all_gradients(layer)
    run_all_gradients(layer, layer.beside(c_out), layer.beside(c_out))
    run_all_gradients(layer, layer.beside(24), layer.beside(40))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("c_in", [768, 1472, 2144])
def test_gpu_1x1_over_a_concat_buffer(c_in, gpu):
    run_all(Layer(2, 25, 42, c_in, 768, kernel=1, device=gpu), pool=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (17, 9), (200, 336), (13, 21)])
def test_gpu_odd_sizes(size, kernel, gpu):
    for crop in (False, True):
        run_all(Layer(2, *size, 160, 160, kernel=kernel, crop=crop, device=gpu), pool=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_results_do_not_change_from_run_to_run(gpu):
    """Many launches in a row: a race would show as a difference some time."""
    layer = Layer(4, 50, 84, 192, 192, device=gpu)
    for engine in conv_sm90.engines(layer.x, layer.weight, layer.out):
        sums = conv_sm90.run(engine, *layer.tensors, pool=True)
        first = layer.out.clone()
        for _ in range(200):
            again = conv_sm90.run(engine, *layer.tensors, pool=True)
            assert torch.equal(layer.out, first)
            assert torch.equal(again, sums)
