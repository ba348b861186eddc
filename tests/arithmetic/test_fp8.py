"""The ops in e4m3: what is rounded, and where."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.arithmetic import fp8
from vovnet_fast.arithmetic.layers import QuantizedConv, QuantizedGate, QuantizedSum

pytestmark = pytest.mark.skipif(fp8.why_not() is not None, reason=str(fp8.why_not()))


def e4m3(x):
    """The nearest of all e4m3 numbers, by a table of them; ties to the even mantissa."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).double()
    keep = values.isfinite() & (codes < 128)
    codes, values = codes[keep].long(), values[keep]
    distance = (x.double().abs()[..., None] - values).abs()
    least = distance.amin(-1, keepdim=True)
    even = (distance == least) & (codes % 2 == 0)
    nearest = torch.where(even.any(-1), even.int().argmax(-1), distance.argmin(-1))
    return values[nearest] * x.sign()


def test_it_rounds_to_nearest_even_and_saturates():
    x = torch.cat([torch.randn(200) * 30, torch.tensor([1e9, -1e9, 449.0, 17.0, 19.0, 0.0, 1e-9])])
    assert torch.equal(fp8.to_e4m3(x).double(), e4m3(x.clamp(-448, 448)))


def test_conv():
    torch.manual_seed(0)
    x, weight = fp8.to_e4m3(torch.randn(1, 5, 4, 6)), fp8.to_e4m3(torch.randn(3, 3, 3, 6))
    bias, multiplier, unit = torch.randn(3), torch.rand(3), torch.rand(3)
    layer = QuantizedConv(weight, bias, multiplier, unit, 2, None, torch.ones(6), None, 1.0)
    out = torch.empty(1, 3, 2, 3, dtype=torch.float8_e4m3fn)
    feature = torch.empty(1, 3, 2, 3)
    sums = fp8.conv(x, layer, out, feature=feature, pool=True)
    y = F.conv2d(
        x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), stride=2, padding=1
    )
    acc = y.permute(0, 2, 3, 1).float() + bias
    assert torch.equal(out.double(), e4m3((acc * multiplier).clamp_min(0)))
    assert torch.equal(feature, (acc * unit).clamp_min(0))
    assert torch.equal(sums[:, 0], out.double().sum((1, 2)).float())


@pytest.mark.parametrize("kind", ["hard_sigmoid", "sigmoid"])
def test_gate_and_identity(kind):
    torch.manual_seed(0)
    z, x = fp8.to_e4m3(torch.rand(2, 1, 2, 2, 4) * 100)
    fc, bias = torch.randn(4, 4) / 50, torch.randn(4)
    gate = QuantizedGate(fc, bias, torch.ones(4), 1, 0.5, kind, None)
    gates = fp8.gates(z.double().sum((1, 2)).float()[:, None], 4, gate)
    logits = z.double().mean((1, 2)) @ fc.double().T + bias
    wanted = (F.relu6(logits + 3) / 6 if kind == "hard_sigmoid" else logits.sigmoid()) * 0.5
    assert torch.allclose(gates.double(), wanted, rtol=1e-6)
    out, feature = torch.empty(1, 2, 2, 4, dtype=torch.float8_e4m3fn), torch.empty(1, 2, 2, 4)
    fp8.apply_gates(z, gates, x, QuantizedSum(0.5, 0.25, 0, 2.0), out, feature=feature)
    acc = z.float() * gates[:, None, None] + x.float() * 0.25
    assert torch.equal(out.double(), e4m3(acc.clamp(max=448)))
    assert torch.equal(feature, acc * 2)
