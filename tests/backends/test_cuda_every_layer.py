"""The cuda backend has an engine of its own for every layer of every architecture: no cuDNN."""

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")  # The cost model is the kernels'.

import vovnet_fast
from tests.csrc import cuda_on_cpu
from tests.tiny import TINY
from vovnet_fast import VoVNet, specs
from vovnet_fast.backends import (
    _aten,
    _cuda_conv,
    _extension,
    conv_sm80,
    conv_sm80_grad,
    conv_sm80_input_grad,
    cuda,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CAPABILITIES = [(8, 0), (8, 6), (9, 0), (12, 0)]
SIZES = [(25, 42), (200, 336), (7, 1)]
"""Of inputs: of an image of a detector, of its large maps, and of hardly anything."""


@functools.cache
def layers():
    """Kernel, stride, C_in and C_out of every convolution, and which of them are depthwise."""
    dense, depthwise = set(), set()
    for spec in specs.SPECS.values():
        with torch.device("meta"):
            model = VoVNet(spec)
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Conv2d) or name.endswith(".fc"):
                continue
            geometry = layer.kernel_size[0], layer.stride[0], layer.in_channels, layer.out_channels
            assert layer.kernel_size[0] == layer.kernel_size[1] == 2 * layer.padding[0] + 1
            assert layer.dilation == (1, 1)
            if layer.groups == 1:
                dense.add(geometry)
            else:
                assert layer.groups == layer.in_channels == layer.out_channels
                depthwise.add(geometry)
        # What a concat buffer holds without its block's input, which may need no gradient.
        for block in model._blocks():
            plan = block.plan
            own = plan.num_layers * plan.mid_channels
            dense.add((1, 1, own, plan.out_channels))
    return dense, depthwise


def test_architectures_have_what_is_looked_at():
    dense, depthwise = layers()
    assert len(dense) > 80
    assert {(kernel, stride) for kernel, stride, _, _ in dense} == {(1, 1), (3, 1), (3, 2)}
    assert {(kernel, stride) for kernel, stride, _, _ in depthwise} == {(3, 1), (3, 2)}
    assert {(3, 2, 3, 64), (3, 2, 64, 128), (1, 1, 352, 256), (1, 1, 128, 56)} <= dense


def slot(height, width, channels, dtype):
    """A view of two images in a wider buffer, without memory; images are packed."""
    wide = channels if channels == 3 else channels + 64
    buffer = torch.empty(2, height, width, wide, dtype=dtype, device="meta")
    return buffer[..., wide - channels :]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layer_has_an_engine(dtype, capability, monkeypatch):
    monkeypatch.setattr(conv_sm80, "why_not", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for module in (conv_sm80, conv_sm80_grad, conv_sm80_input_grad):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    for kernel, stride, c_in, c_out in layers()[0]:
        weight = torch.empty(c_out, kernel, kernel, c_in, dtype=dtype, device="meta")
        packed = torch.empty(c_in, kernel, kernel, c_out, dtype=dtype, device="meta")
        for size in SIZES:
            x = slot(*size, c_in, dtype)
            y = slot(*((s - 1) // stride + 1 for s in size), c_out, dtype)
            layer = (kernel, stride, c_in, c_out, size)
            assert conv_sm80.engines(x, weight, y, stride=stride), layer
            assert conv_sm80_grad.engines(x, y, kernel, stride=stride), layer
            beside = dict(add=x, mask=x)
            if conv_sm80_input_grad.takes(packed, stride):
                found = conv_sm80_input_grad.engines(y, packed, x, stride=stride, **beside)
            else:
                found = conv_sm80.engines(y, packed, x, **beside)
            assert found, layer


def test_depthwise_layers_are_the_extensions_own():
    """Forward and both gradients, for both strides; ATen is not called."""
    for name in ("depthwise", "depthwise_input_grad", "depthwise_weight_grad"):
        function = getattr(cuda, name)
        assert isinstance(function.__self__, _extension.Ops)
        assert "_aten" not in inspect.getsource(function)


# --------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Notes every convolution of PyTorch's own, and every gradient of one, outside of ops."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func) or "conv2d" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def refuse(*args, **options):
    """In place of a convolution of ATen's."""
    raise AssertionError("an engine of ATen's was taken")


@pytest.fixture
def backend(once, monkeypatch):
    """The cuda backend, whose kernels run on the host, without cuDNN and with TF32 of 23 bits."""
    module = cuda_on_cpu.built(once)
    ops = _extension.Ops(lambda: module, cuda_on_cpu.on_host)
    for name, function in vars(cuda).items():
        if getattr(function, "__self__", None) is _extension.CUDA:
            monkeypatch.setattr(cuda, name, getattr(ops, name))
    monkeypatch.setattr(_extension, "CUDA", ops)
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    monkeypatch.setattr(conv_sm80, "why_not", lambda device: None)
    monkeypatch.setattr(_cuda_conv, "cudnn", lambda: False)
    for name in ("conv", "input_grad", "input_grad_of", "weight_grad"):
        monkeypatch.setattr(_aten, name, refuse)
    module.tf32_rounds(False)
    yield
    module.tf32_rounds(True)


def step(net, x, name):
    """A training step on a backend: features and gradients in fp64, and PyTorch's convolutions."""
    x = x.clone().requires_grad_()
    with vovnet_fast.use_backend(name), Convolutions() as noted:
        features = net(x)
        random = torch.Generator().manual_seed(1)
        sum((f * torch.randn(f.shape, generator=random)).sum() for f in features).backward()
    gradients = [x.grad, *(parameter.grad for parameter in net.parameters())]
    return [t.detach().double() for t in features], [t.double() for t in gradients], noted.found


@pytest.mark.parametrize("norm_eval", [True, False], ids=["fixed", "batch"])
@pytest.mark.parametrize("architecture", ["detectron2", "depthwise"])
def test_a_training_step_takes_no_convolution_of_pytorchs(architecture, norm_eval, backend):
    """Images have a gradient too. Products are not rounded to TF32, which would move ReLUs."""
    torch.manual_seed(2)
    net = VoVNet(TINY[architecture], norm_eval=norm_eval).train()
    other = VoVNet(TINY[architecture], norm_eval=norm_eval).train()
    other.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 65, 70)
    features, gradients, calls = step(net, x, "cuda")
    exact_features, exact, expected = step(other, x, "reference")
    assert calls == []
    assert len(expected) > 20  # What is looked for would be found.
    for found, right in ((features, exact_features), (gradients, exact)):
        errors = sorted(((f - e).norm() / e.norm()).item() for f, e in zip(found, right))
        assert errors[len(errors) // 2] < 1e-4
        assert errors[-1] < 0.1  # A ReLU may be off by a rounding.
