"""Every engine of a convolution leaves the same result, and the measured one is taken."""

import pytest
import torch

from vovnet_fast import tuning
from vovnet_fast.backends import triton as backend
from vovnet_fast.backends.triton import convolution
from vovnet_fast.backends.triton.choosing import load_kernels

ON_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _exact_fp32(monkeypatch):
    """Engines differ in what TF32 rounds."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def layer(kernel, c_in, c_out, stride, dtype, device):
    x = torch.randn(2, 9, 11, c_in + 16, device=device).to(dtype)[..., 8 : 8 + c_in]
    weight = (torch.randn(c_out, kernel, kernel, c_in, device=device) / c_in**0.5).to(dtype)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = torch.rand(2, c_out, dtype=high, device=device)
    size = [(side - 1) // stride + 1 for side in (9, 11)]
    buffer = torch.full((2, *size, c_out + 32), float("nan"), dtype=dtype, device=device)
    return x, weight, scale, shift, buffer


def expected(x, weight, scale, shift, stride):
    x, weight, scale, shift = (t.double() for t in (x, weight, scale, shift))
    z = torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2),
        weight.permute(0, 3, 1, 2),
        stride=stride,
        padding=weight.shape[1] // 2,
    )
    return (z.permute(0, 2, 3, 1) * scale + shift).relu()


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("c_in", "c_out"), [(32, 80), (80, 64)])
def test_engines_agree(kernel, stride, pool, c_in, c_out, dtype, device):
    x, weight, scale, shift, buffer = layer(kernel, c_in, c_out, stride, dtype, device)
    right = expected(x, weight, scale, shift, stride)
    out = buffer[..., 16:-16]
    found, static = load_kernels().conv.choices(x, weight, out, stride=stride)
    assert static in found
    tolerance = {2: 2e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    for engine in [backend.ATEN, *(config.name for config in found)]:
        buffer.fill_(float("nan"))
        partials = backend.run_engine(
            engine, x, weight, scale, shift, out, stride=stride, relu=True, pool=pool
        )
        torch.testing.assert_close(
            out.double(), right, rtol=tolerance, atol=tolerance, msg=lambda m, e=engine: f"{e} {m}"
        )
        assert buffer[..., :16].isnan().all()
        assert buffer[..., -16:].isnan().all()
        if pool:
            sums = right.sum((1, 2))
            torch.testing.assert_close(
                partials.sum(1).double(), sums, rtol=tolerance, atol=99 * tolerance
            )
        else:
            assert partials is None


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The engines that run, where anything may be measured, into a file of its own."""
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "may_measure", lambda device: True)
    # It is said once a process: which test would see it depends on their order.
    monkeypatch.setattr(tuning, "_announce", lambda: None)
    ran, run_engine = [], backend.run_engine

    def watch(engine, *args, **kwargs):
        ran.append(engine)
        return run_engine(engine, *args, **kwargs)

    def timer(work):
        """A preference, as what is fastest differs from machine to machine."""
        work()
        return 1.0 if ran[-1] == backend.ATEN else 2.0

    monkeypatch.setattr(convolution, "run_engine", watch)
    monkeypatch.setattr(tuning, "_device_timer", lambda device: timer)
    tuning._table.cache_clear()
    yield ran
    tuning._table.cache_clear()


OPTIONS = dict(stride=1, relu=True, pool=True)


def test_the_measured_engine_runs(ran, device):
    x, weight, scale, shift, buffer = layer(3, 32, 64, 1, torch.float32, device)
    backend.conv(x, weight, scale, shift, buffer[..., 16:-16], **OPTIONS)
    count = len(set(ran))
    assert count > 1
    assert ran[:count] == ran[count:-1]  # All are tried, then all are timed.
    assert ran[0] == ran[-1] == backend.ATEN
    ran.clear()
    backend.conv(x, weight, scale, shift, buffer[..., 16:-16], **OPTIONS)
    assert ran == [backend.ATEN]


def double(out):
    out.mul_(2)


def leave_a_pixel(out):
    out[-1, -1, -1] = float("nan")


def write_beside(out):
    n, h, w, c = out.shape
    out.as_strided((n, h, w, c + 1), out.stride())[..., c] = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (double, "error "),
        (leave_a_pixel, "error inf"),
        (write_beside, "it wrote outside its slot"),
        ("pool", "error "),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_wrong_engine_is_left_out(ran, damage, message, zeros, device, monkeypatch, caplog):
    """Whatever is wrong with it, and where the layer's own numbers would hide it."""
    x, weight, scale, shift, buffer = layer(1, 32, 64, 1, torch.float32, device)
    if zeros:
        x.zero_()
        shift.zero_()
    watched = convolution.run_engine

    def run_engine(engine, x, weight, scale, shift, out, **options):
        sums = watched(engine, x, weight, scale, shift, out, **options)
        if engine == backend.ATEN:
            return sums * 2 if damage == "pool" else (damage(out), sums)[1]
        return sums

    monkeypatch.setattr(convolution, "run_engine", run_engine)
    before, out = buffer.clone(), buffer[..., 16:-16]
    backend.conv(x, weight, scale, shift, out, **OPTIONS)
    assert ran.count(backend.ATEN) == 1
    right = expected(x, weight, scale, shift, 1)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    before[..., 16:-16] = out
    assert torch.equal(buffer.nan_to_num(), before.nan_to_num())
    [warning] = caplog.messages
    assert warning.startswith("candidate aten is wrong and is left out, conv 1x1 stride 1 32>64 on")
    assert message in warning


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("expanded", [False, True])
def test_right_engines_pass_their_trial(ran, dtype, expanded, device, caplog, monkeypatch):
    monkeypatch.setenv(tuning.ENVIRONMENT, tuning.ALL)
    x, weight, scale, shift, buffer = layer(3, 32, 16, 1, dtype, device)
    x = x[:1].expand_as(x) if expanded else x
    backend.conv(x, weight, scale, shift, buffer[..., 16:-16], **OPTIONS)
    found, _ = load_kernels().conv.choices(x, weight, buffer[..., 16:-16])
    assert {backend.ATEN, *(config.name for config in found)} <= set(ran)
    assert caplog.messages == []


@pytest.mark.skipif(ON_GPU, reason="a GPU may be measured")
def test_the_static_choice_runs_where_nothing_can_be_measured(monkeypatch, device):
    x, weight, scale, shift, buffer = layer(1, 32, 64, 1, torch.float32, device)
    out = buffer[..., 16:-16]
    _, static = load_kernels().conv.choices(x, weight, out)
    engine = backend.choose_engine(x, weight, scale, shift, out, stride=1, relu=True, pool=False)
    assert engine == static.name


def test_choices_hold_for_images_of_similar_sizes(monkeypatch, device):
    """Detectors train on images of hundreds of sizes: not each may be measured."""
    problems, names = set(), set()

    def choose(device, problem, candidates, static, run, prepare=None):
        problems.add(problem)
        names.add(tuple(candidates))
        return static

    monkeypatch.setattr(tuning, "choose", choose)
    for height, width in ((40, 48), (33, 60), (61, 32)):
        x = torch.zeros(1, height, width, 32, device=device)
        out, weight = torch.zeros_like(x), torch.zeros(32, 3, 3, 32, device=device)
        vector = torch.zeros(32, device=device)
        options = dict(stride=1, relu=True, pool=False)
        backend.choose_engine(x, weight, vector, vector, out, **options)
        backend.choose_weight_grad_engine(x, out, weight, None, stride=1)
    assert len(problems) == 2
    assert len(names) == 2
