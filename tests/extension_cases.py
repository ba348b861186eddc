"""What both halves of the extension, and each of its builds, have to do.

A test module that imports all of this defines a fixture ``kernels``: a
:class:`vovnet_fast.backends._extension.Ops`. Tensors are on ``kernels_device``.

Results are held against the reference in fp64: the error may be twice that of plain
PyTorch in the same dtype, plus one rounding (:mod:`vovnet_fast.selfcheck`). Slots are
surrounded by NaN, so that whoever reads or writes beside one is found out.
"""

import functools
import itertools
import os

import pytest
import torch

from tests.features import require_half
from vovnet_fast import selfcheck
from vovnet_fast.backends import _extension, reference
from vovnet_fast.compat import zip
from vovnet_fast.selfcheck import calls, runner, tensors
from vovnet_fast.selfcheck.calls import Layer
from vovnet_fast.selfcheck.cases import Case, of_layers, of_shapes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
by_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def require(half):
    """Skip where the extension is not built, which in CI it must be."""
    reason = _extension.why_not(half)
    if reason is None:
        return
    if half == "cpu" and os.environ.get("CI") == "true":
        pytest.fail(f"CI builds the extension: {reason}")
    pytest.skip(reason)


# --------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------


class Tensors(tensors.Tensors):
    """Slots in one of three layouts.

    ``slot``: of a wider buffer, aligned. ``crop``: of a larger image too, so that rows do
    not follow each other. ``odd``: at an odd offset, with an odd pixel stride.
    """

    LAYOUTS = ("slot", "crop", "odd")

    def __init__(self, rounding, dtype, device, layout="slot"):
        super().__init__(rounding, dtype, device)
        self.layout = layout

    def output(self, *shape):
        if self.layout == "slot":
            return super().output(*shape)
        _, h, w, c = shape
        odd = self.layout == "odd"
        pixel = c + (33 if odd else 32)
        row = (w + (0 if odd else 2)) * pixel
        strides = ((h + 2) * row, row, pixel, 1)
        slot = selfcheck.Slot(shape, strides, self.dtype, self.device, alignment=int(odd))
        self._slots.append(slot)
        return slot.view


def check(case, kernels, dtype, device, layout="slot"):
    """Hold one case against the reference; returns what is wrong, or None."""
    exact = list(case.call(reference, Tensors(dtype, torch.float64, device)))
    eager = list(case.call(reference, Tensors(dtype, dtype, device)))
    given = Tensors(dtype, dtype, device, layout)
    found = list(case.call(kernels, given))
    assert [out.shape for out in found] == [out.shape for out in exact]
    for number, outputs in enumerate(zip(found, eager, exact, strict=True)):
        ours, theirs, right = outputs
        if right.numel() == 0:
            continue
        error = tensors.largest(ours.double() - right)
        allowed = runner.limit(theirs, right, False)
        if error > allowed:
            return f"output {number}, layout {layout}: error {error:.3g}, allowed {allowed:.3g}"
    if not given.untouched():
        return f"layout {layout}: it wrote outside its slot"
    return None


# --------------------------------------------------------------------------------------
# Cases: those of the self-check on other shapes, and functions that it does not have
# --------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 9, 3),
    (2, 9, 1, 5),
    (3, 2, 2, 17),
    (1, 7, 5, 56),
    (2, 17, 31, 16),  # Several tiles, the last one not full.
    (1, 3, 4, 130),
]


LAYERS = [
    Layer(3, 3, 5, (1, 1, 1)),
    Layer(3, 5, 17, (2, 1, 9)),
    Layer(3, 4, 16, (2, 7, 6), 2),
    Layer(1, 33, 24, (2, 17, 31)),
    Layer(1, 16, 1, (1, 5, 3), 2),
]


def accumulate(backend, t, *, shape, added, masked):
    n, h, w, _ = shape
    z, out = t.activations(*shape), t.output(*shape)
    add = t.activations(n, h, w, added) if added else None
    mask = t.activations(n, h, w, masked, relu=True) if masked else None
    if backend is reference:
        reference._accumulate(z, out, add, mask)
    else:
        backend.accumulate(z, out, add, mask)
    yield out


def epilogue(backend, t, *, shape, relu):
    """Without a ReLU, and as a copy."""
    z, out, copy = t.activations(*shape), t.output(*shape), t.output(*shape)
    scale, shift = t.vector(shape[3]), t.vector(shape[3], low=-0.5, high=0.5)
    if backend is reference:
        y = z * scale + shift
        out.copy_(y.relu() if relu else y)
        copy.copy_(z)
    else:
        backend.epilogue(z, scale, shift, out, relu=relu)
        backend.epilogue(z, None, None, copy, relu=False)
    yield from (out, copy)


def channel_sums(backend, t, *, shape):
    g = t.activations(*shape)
    sums = t.vector(shape[3]).dtype
    yield g.sum((0, 1, 2), dtype=sums) if backend is reference else backend.channel_sums(g)


def pack(backend, t, *, shape, transposed, scaled):
    """From a weight in PyTorch's own layout."""
    c_out, kernel, _, c_in = shape
    weight = t.weight(c_out, c_in, kernel, kernel, fan=c_in).permute(0, 2, 3, 1)
    scale = t.vector(c_out) if scaled else None
    found = torch.full((c_in, kernel, kernel, c_out) if transposed else shape, torch.nan).to(weight)
    if backend is not reference:
        (backend.pack_transposed if transposed else backend.pack)(weight, scale, found)
    else:
        product = weight if scale is None else weight * scale[:, None, None, None]
        found.copy_(product.permute(3, 1, 2, 0).flip(1, 2) if transposed else product)
    yield found


def pack_backward(backend, t, *, shape, scaled):
    c_out, kernel, _, c_in = shape
    products = t.weight(c_out, c_in, kernel, kernel, fan=1).permute(0, 2, 3, 1)
    weight, scale = t.weight(*shape, fan=1), t.vector(c_out) if scaled else None
    if backend is not reference:
        yield from (
            grad for grad in backend.pack_backward(products, weight, scale) if grad is not None
        )
        return
    yield products * (1 if scale is None else scale[:, None, None, None])
    if scaled:
        yield (products * weight).sum((1, 2, 3), dtype=scale.dtype)


def gates(backend, t, *, shape, kind, parameters):
    """With parameters in another dtype than the sums."""
    n, tiles, c = shape
    partials, weight = t.vector(n, tiles, c, high=2), t.weight(c, c, fan=5)
    bias = t.vector(c, low=-1).to(parameters)
    yield from backend.gates(partials, 6, weight.to(parameters), bias, kind)


def gates_backward(backend, t, *, shape, kind, parameters):
    n, _, c = shape
    dgates, found = t.vector(n, c, low=-1, high=1), t.vector(n, c, low=-0.25, high=1.25)
    weight = t.weight(c, c, fan=c).to(parameters)
    yield from backend.gates_backward(dgates, found.clamp(0, 1), t.vector(n, c), 35, weight, kind)


def batch_norm_finish(backend, t, *, parts, channels, parameters):
    """Parts of different sizes, one of them empty with NaN beside its count."""
    sums, deviations = t.vector(parts, channels, low=-9, high=90), t.vector(parts, channels)
    counts = torch.arange(parts, dtype=sums.dtype, device=sums.device)[:, None].expand_as(sums)
    partials = torch.stack([counts, sums, deviations], 1)
    gamma, beta = (t.vector(channels).to(parameters) for _ in range(2))
    exact = partials.clone()
    partials[0, 1:] = torch.nan
    if backend is reference:
        exact[0, 1:] = 0
        partials = exact
    yield from backend.batch_norm_finish(partials, gamma, beta, 1e-5)
    yield from backend.batch_norm_merge(partials)


def _named(function, words, call, **options):
    return Case(function, words, functools.partial(call, **options))


WEIGHTS = [(5, 3, 3, 17), (16, 1, 1, 33), (1, 3, 3, 1)]
POOLED = [shape for shape in SHAPES if min(shape[1:3]) > 1]

CASES = [
    *(case for case in selfcheck.CASES if not case.slim),  # Widths of networks take long.
    *of_shapes(calls.normalize, *SHAPES, pool=True),
    *of_shapes(epilogue, *SHAPES, relu=False),
    *of_shapes(epilogue, *SHAPES[-1:], relu=True),
    *of_shapes(calls.apply_gates, *SHAPES, gated=True, added=True),
    *of_shapes(calls.apply_gates_backward, *SHAPES, gated=True),
    *of_shapes(calls.gate_sums, *SHAPES),
    *of_shapes(calls.batch_norm_sums, *SHAPES),
    *of_shapes(calls.batch_norm_input_grad, *SHAPES),
    *of_shapes(channel_sums, *SHAPES),
    *(case for stride in (1, 2) for call in (
        calls.depthwise, calls.depthwise_input_grad, calls.depthwise_weight_grad,
    ) for case in of_shapes(call, *SHAPES, stride=stride)),
    *of_shapes(calls.max_pool, *SHAPES, mode="padded", kept=True),
    *of_shapes(calls.max_pool, *POOLED, mode="ceil", kept=True),
    *of_shapes(calls.max_pool_backward, *SHAPES, mode="padded"),
    *of_shapes(calls.max_pool_backward, *POOLED, mode="ceil"),
    *(case for added, masked in itertools.product((0, 1, 24, 40, 56), repeat=2)
      for case in of_shapes(accumulate, (1, 7, 5, 56), added=added, masked=masked)),
    *of_shapes(accumulate, *SHAPES[:4], added=1, masked=1),
    *(case for transposed, scaled in itertools.product((False, True), repeat=2)
      for case in of_shapes(pack, *WEIGHTS, transposed=transposed, scaled=scaled)),
    *(case for scaled in (False, True)
      for case in of_shapes(pack_backward, *WEIGHTS, scaled=scaled)),
    *(case for call in (gates, gates_backward) for kind in ("hard_sigmoid", "sigmoid")
      for parameters in DTYPES
      for case in of_shapes(call, (3, 5, 17), (2, 1, 80), kind=kind, parameters=parameters)),
    *(_named("batch_norm_finish", f"{parts} parts, {c} channels, {parameters}",
             batch_norm_finish, parts=parts, channels=c, parameters=parameters)
      for parts, c in ((2, 1), (37, 17), (600, 80))
      for parameters in (torch.float16, torch.float64)),
    *of_layers(calls.conv, *LAYERS, pool=True),
    *of_layers(calls.conv_statistics, *LAYERS),
    *of_layers(calls.conv_input_grad, *LAYERS, scaled=True, added=True),
    *of_layers(calls.conv_weight_grad, *LAYERS, scaled=True),
]  # fmt: skip


@by_dtype
@pytest.mark.parametrize("function", sorted({case.function for case in CASES}))
@torch.no_grad()
def test_against_fp64(function, dtype, kernels, kernels_device):
    if function.startswith(("conv", "depthwise", "max_pool")):
        require_half(dtype, kernels_device)
    for case in CASES:
        if case.function != function:
            continue
        for layout in Tensors.LAYOUTS:
            wrong = check(case, kernels, dtype, kernels_device, layout)
            assert wrong is None, f"{case.words}: {wrong}"


# --------------------------------------------------------------------------------------
# What the cases do not have
# --------------------------------------------------------------------------------------


def randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


@by_dtype
def test_in_place(dtype, kernels, kernels_device):
    """Where an output may be an input, it is the same as apart."""
    views = [randn(2, 5, 7, 24, dtype=dtype, device=kernels_device) for _ in range(3)]
    high = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, c = (randn(2, 24, dtype=high, device=kernels_device) for _ in range(3))
    norm = torch.cat([a, b, c]).abs()

    def call(name, out, x, y):
        if name == "epilogue":
            kernels.epilogue(x, a[0], b[0], out)
        elif name == "accumulate":
            kernels.accumulate(x, out, y, y)
        elif name == "apply_gates":
            kernels.apply_gates(x, a, y, out)
        elif name == "apply_gates_backward":
            kernels.apply_gates_backward(x, a, b, y, out)
        else:
            kernels.batch_norm_input_grad(x, y, norm, c, None, out)

    aliased = ("epilogue", "accumulate", "apply_gates", "apply_gates_backward", "batch_norm")
    for name, position in itertools.product(aliased, range(2)):
        if (name, position) == ("epilogue", 1):
            continue
        expected = torch.full_like(views[0], torch.nan)
        call(name, expected, *views[:2])
        inputs = [view.clone() for view in views[:2]]
        call(name, inputs[position], *inputs)
        assert torch.equal(inputs[position], expected), (name, position)


def test_statistics_of_a_copy_in_place(kernels, kernels_device):
    z = randn(2, 17, 31, 24, device=kernels_device)
    apart = torch.empty(2, kernels.tiles(z), 3, 24, device=kernels_device)
    same, out = torch.empty_like(apart), torch.empty_like(z)
    kernels.epilogue(z, None, None, out, relu=False, statistics=apart)
    kernels.epilogue(z, None, None, z, relu=False, statistics=same)
    assert torch.equal(apart, same)
    assert torch.equal(z, out)


def test_statistics_with_a_large_mean(kernels, kernels_device):
    """A sum of squares would have no correct digit of the variance left."""
    z = 4096 + randn(2, 40, 41, 20, device=kernels_device)
    partials = torch.empty(2, kernels.tiles(z), 3, 20, device=kernels_device)
    kernels.epilogue(z, None, None, z, relu=False, statistics=partials)
    norm = kernels.batch_norm_finish(partials.flatten(0, 1), None, None, 0.0)
    exact = z.double().var((0, 1, 2), unbiased=True)
    torch.testing.assert_close(norm[4].double(), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(norm[0].double(), z.double().mean((0, 1, 2)), rtol=1e-7, atol=0)


def everything(backend, dtype, device, wide, narrow, x, y):
    """Outputs of functions that take gradients or activations, by name.

    ``wide`` and ``narrow`` are gradients, the latter of what has stride 2; ``x`` and ``y``
    activations.
    """
    torch.manual_seed(1)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    n, _, _, c = x.shape
    gates, dpixel = (randn(n, c, dtype=high, device=device) for _ in range(2))
    norm = (torch.rand(6, c, dtype=torch.float64) + 0.5).to(device, high)
    taps = randn(3, 3, c, dtype=dtype, device=device)
    argmax = torch.randint(0, 9, narrow.shape, dtype=torch.uint8).to(device)

    def written(function, *args, like=x, **options):
        out = torch.full(like.shape, torch.nan, dtype=dtype, device=device)
        function(*args, out, **options)
        return out

    yield "normalize", written(backend.normalize, x, norm[0], norm[1])
    yield "apply_gates", written(backend.apply_gates, x, gates, wide)
    yield "gate_sums", backend.gate_sums(wide, x)
    yield "apply_gates_backward", written(backend.apply_gates_backward, wide, gates, dpixel, y)
    yield "batch_norm_sums", backend.batch_norm_sums(wide, x, norm)
    args = (wide, x, norm, norm[:2].contiguous(), None)
    yield "batch_norm_input_grad", written(backend.batch_norm_input_grad, *args)
    yield "depthwise", written(backend.depthwise, x, taps, like=narrow, stride=2)
    options = dict(stride=2, add=wide, mask=y)
    yield "depthwise_input_grad", written(backend.depthwise_input_grad, narrow, taps, **options)
    yield "depthwise_weight_grad", backend.depthwise_weight_grad(x, narrow, stride=2)
    pooled, found = torch.empty_like(argmax, dtype=dtype), torch.empty_like(argmax)
    backend.max_pool(x, pooled, "padded", found)
    yield from (("max_pool", pooled), ("argmax", found))
    yield "max_pool_backward", written(backend.max_pool_backward, narrow, argmax, mode="padded")


@by_dtype
def test_expanded_gradients(dtype, kernels, kernels_device):
    """The gradient of a sum has stride 0 everywhere but along the channels."""
    x, y = (randn(2, 6, 8, 12, dtype=dtype, device=kernels_device) for _ in range(2))
    wide = randn(1, 1, 1, 12, dtype=dtype, device=kernels_device).expand(x.shape)
    narrow = wide[:, ::2, ::2]
    given = (kernels, dtype, kernels_device)
    expanded = everything(*given, wide, narrow, x, y)
    packed = everything(*given, wide.contiguous(), narrow.contiguous(), x, y)
    for (name, ours), (_, theirs) in zip(expanded, packed, strict=True):
        assert torch.equal(ours, theirs), name


@by_dtype
def test_nan_and_inf_go_where_they_go_in_torch(dtype, kernels, kernels_device):
    def polluted(*shape):
        values = randn(*shape, dtype=dtype, device=kernels_device)
        for value in (torch.nan, torch.inf, -torch.inf):
            values.view(-1)[torch.randint(0, values.numel(), (5,))] = value
        return values

    views = [polluted(2, *size, 12) for size in ((6, 8), (3, 4), (6, 8), (6, 8))]
    # In fp32: in other dtypes some of torch's own depthwise gradients spread NaN.
    expected = everything(reference, torch.float32, kernels_device, *(v.float() for v in views))
    for (name, ours), (_, theirs) in zip(
        everything(kernels, dtype, kernels_device, *views), expected, strict=True
    ):
        kinds = [t.isnan() + 2 * t.isposinf() + 3 * t.isneginf() for t in (ours, theirs)]
        assert torch.equal(*kinds), name
        if name == "argmax":
            assert torch.equal(ours, theirs)
        else:
            assert kinds[0].any(), f"{name} should put out something that is not finite"


def test_gates_of_nan(kernels, kernels_device):
    """NaN stays NaN; where the hard sigmoid is flat nothing passes, not even NaN."""
    partials = torch.ones(1, 1, 3, device=kernels_device)
    partials[..., 1] = torch.nan
    eye, zeros = torch.eye(3, device=kernels_device), torch.zeros(3, device=kernels_device)
    for kind in ("hard_sigmoid", "sigmoid"):
        found, _ = kernels.gates(partials, 1, eye, zeros, kind)
        assert found.isnan().all()  # The mean of one channel is in every sum.
    gates = torch.tensor([[0.0, 1.0, 0.5]], device=kernels_device)
    dgates = torch.full_like(gates, torch.nan)
    _, _, dbias = kernels.gates_backward(dgates, gates, gates, 1, eye, "hard_sigmoid")
    assert dbias.isnan().tolist() == [False, False, True]


@by_dtype
def test_nothing_to_do(dtype, kernels, kernels_device):
    """No images: nothing is written, and sums are zero."""
    x = torch.empty(0, 6, 8, 12, dtype=dtype, device=kernels_device)
    narrow = torch.empty(0, 3, 4, 12, dtype=dtype, device=kernels_device)
    zeros = ("batch_norm_sums", "depthwise_weight_grad")
    for name, found in everything(kernels, dtype, kernels_device, x, narrow, x, x):
        assert (found == 0).all() if name in zeros else found.numel() == 0, name
    assert (kernels.channel_sums(x) == 0).all()
    high = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.ones(5, dtype=high, device=kernels_device)
    weight = torch.ones(5, 3, 3, 12, dtype=dtype, device=kernels_device)
    out = torch.empty(0, 6, 8, 5, dtype=dtype, device=kernels_device)
    assert (kernels.conv(x, weight, scale, scale, out, pool=True) == 0).all()
    assert kernels.conv_statistics(x, weight, out).shape[1:] == (3, 5)
    assert all((grad == 0).all() for grad in kernels.conv_weight_grad(x, out, weight, scale))
    kernels.conv_input_grad(out, weight, scale, x)
    empty, fc = torch.empty(0, 12, dtype=high, device=kernels_device), weight.new_ones(12, 12)
    _, dweight, dbias = kernels.gates_backward(empty, empty, empty, 4, fc, "sigmoid")
    assert (dweight == 0).all()
    assert (dbias == 0).all()


def test_what_does_not_fit_is_refused(kernels, kernels_device):
    x = torch.zeros(1, 4, 4, 8, device=kernels_device)
    vector = torch.zeros(8, device=kernels_device)
    for z, scale, out, message in (
        (x, vector[:7], x, r"scale must be .* of shape \(8,\)"),
        (x, vector.double(), x, "scale must be a contiguous torch.float32"),
        (x, vector, x[..., :7], r"out must have shape \(1, 4, 4, 8\)"),
        (x, vector, x.double(), "out must be torch.float32"),
        (x, vector, x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)[..., :8],
         "out must have"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=message):
            kernels.normalize(z, scale, vector, out)
    with pytest.raises(AssertionError, match="no kernel with stride 3"):
        kernels.depthwise(x, torch.zeros(3, 3, 8, device=kernels_device), x, stride=3)
