"""Who does the work: one module a backend, the same functions with the same signatures.

=================  ==========================================================
``reference``      plain PyTorch, any device
``cpu``            the CPU half of the extension ``vovnet_fast._C`` (csrc/cpu); gradients of
                   convolutions are oneDNN's
``triton``         the Triton kernels of :mod:`vovnet_fast.kernels`, NVIDIA GPUs
``cuda``           the CUDA half of the extension (csrc/cuda), with cuDNN's convolutions,
                   NVIDIA GPUs
=================  ==========================================================

Beside them lies what they share:

========================  =========================================================
``_extension``            ``vovnet_fast._C``: finding it, and its functions on tensors
``_aten``                 PyTorch's own convolutions on views
``conv_sm80``             the extension's convolution for sm_80 and newer, an engine of ``cuda``
``conv_sm80_grad``        its weight gradient
``conv_sm80_input_grad``  its input gradients with stride 2, and of images
``conv_sm90``             the extension's convolution for Hopper, an engine of two backends
``conv_sm90_tiles``       its tiles, and what they fetch
``cudnn_graph``           cuDNN's graphs, from a slot into a slot, an engine of ``triton``
``depthwise_conv``        the extension's depthwise 3x3 and 1x1 in one kernel, an engine of ``cuda``
``_cuda_conv``            the choice among engines of ``cuda``
``_cuda_depthwise``       that for depthwise layers
``_engines``              what choosing among engines takes: names of problems, trials
``_predict``              which engines are worth measuring
``_predict_depthwise``    the same of depthwise layers
``eight_bits``            which backend's ops run a network in int8 or fp8
========================  =========================================================

A backend asked for by name that cannot run is an error, never a silent fallback. Asked
for none, or for ``auto``, the first of :data:`CANDIDATES` is taken that can run, and whose
functions that will be used have passed :mod:`vovnet_fast.selfcheck` on that device in that dtype,
and otherwise the reference.

Every backend has these functions. Activations are ``[N, H, W, C]`` views with
channel stride 1, usually slots of a concat buffer; results are written into the
``out`` that is given, and nothing outside it. Vectors over the channels, and gradients
of parameters, are in fp32 (fp64 for fp64).

Forward:

``conv(x, weight, scale, shift, out, *, stride, relu, pool)``
    out = relu(conv(x, weight) * scale + shift), padded by K // 2. ``weight`` is
    ``[C_out, K, K, C_in]``, contiguous in the dtype of ``x``, or in any dtype and with any strides
    where the backend says ``WEIGHTS_AS_THEY_ARE``; ``scale`` and ``shift`` are ``[C_out]``. With
    ``pool`` it returns partial sums of the output, ``[N, T, C_out]``, whose sum over T is the sum
    over the pixels.
``conv_statistics(x, weight, out, *, stride)``
    out = conv(x, weight). Returns partial statistics of the output, ``[R, 3, C_out]``: of
    each of R parts of the pixels their count, their sum, and the sum of their squared
    deviations from the part's own mean.
``normalize(z, scale, shift, out, *, pool)``
    out = relu(z * scale + shift), and partial sums as ``conv`` has them.
``batch_norm_merge(partials)``
    one part, ``[3, C]``, from several.
``batch_norm_finish(partials, gamma, beta, eps)``
    ``[6, C]`` statistics (:mod:`vovnet_fast.ops.batch_norm`) from several parts.
``depthwise(x, weight, out, *, stride)``
    depthwise 3x3, ``weight`` is ``[3, 3, C]``.
``depthwise_conv(x, weight, scale, shift, out, *, taps, stride, relu, pool, spatial)``
    ``conv`` of what ``depthwise`` makes of x with ``taps`` and ``stride``; ``weight`` is that of a
    1x1. ``spatial()`` gives who needs it memory for what is between the two, contiguous. Without
    this function and the next in a backend, ``depthwise`` and then ``conv`` are called.
``depthwise_conv_statistics(x, weight, out, *, taps, stride, spatial)``
    the same with ``conv_statistics``.
``copy(x, out)``, ``depthwise_taps(weight, dtype)``
    out = x; ``depthwise``'s weight of any dtype and strides as it is taken. Without these functions
    in a backend, PyTorch does it.
``gates(partials, num_pixels, fc_weight, fc_bias, kind)``
    ``[N, C]`` gates of effective Squeeze-Excitation from ``conv``'s partial sums, and the
    means that they come from.
``apply_gates(z, gates, identity, out)``
    out = z * gates + identity; either of the two may be None.
``max_pool(x, out, mode, argmax)``
    3x3 max pool with stride 2. ``argmax``, uint8 and contiguous, or None, receives where in
    its window each maximum is, 3 * row + column.

Backward. ``add`` (or None) is added to the gradient of the first of its channels, and may
be ``out`` itself; ``mask`` (or None) holds activations that belong to the last channels: where
they are not positive, the sum becomes zero. NaN lets gradients through.

``conv_input_grad(g, weight, scale, out, *, stride, add, mask)``
    out = mask(transposed conv(g * scale, weight) + add). ``weight`` is of any dtype, contiguous or
    as above; ``scale`` may be None.
``conv_weight_grad(x, g, weight, scale, *, stride)``
    gradients of ``conv``'s weight, scale and shift, where ``g`` is that of its output before the
    ReLU. Without ``scale`` that of the weight is as if it were one, and its own is None. ``weight``
    is as there.
``depthwise_input_grad(g, weight, out, *, stride, add, mask)``
    out = mask(transposed depthwise(g, weight) + add).
``depthwise_weight_grad(x, g, *, stride)``
    ``[3, 3, C]``, the gradient of ``depthwise``'s weight.
``gate_sums(dout, y)``
    ``[N, C]`` sums over the pixels of dout * y, the gradients of gates that were applied to y.
``gates_backward(dgates, gates, mean, num_pixels, fc_weight, kind)``
    what every pixel gets of the gradient of the mean, ``[N, C]``, and the gradients of
    ``fc_weight`` and of the bias.
``apply_gates_backward(dout, gates, dpixel, y, out)``
    out = mask(dout * gates + dpixel), masked by y; both of the two may be None.
``max_pool_backward(dout, argmax, out, mode)``
    out = the gradient of ``max_pool``'s input.
``batch_norm_sums(g, z, norm)``
    ``[2, C]`` sums of g and of g * normalised z, over images and pixels.
``batch_norm_input_grad(g, z, norm, sums, gamma, out)``
    out = the gradient of z, the input of a batch norm with the batch's statistics ``norm``; may
    be ``g`` itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import ModuleType

import torch

from .. import _environment, compat, tuning

NAMES = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "VOVNET_FAST_BACKEND"

CANDIDATES: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
"""What ``auto`` considers by type of device, best first. After them comes the reference."""


class _Choice(threading.local):
    """What use_backend says in this thread. (torch.compile cannot trace a ContextVar.)"""

    def __init__(self) -> None:
        # Not as an attribute of the class, which torch.compile would not watch for changes.
        self.name: str | None = None
        self.noted: set[str] | None = None


_choice = _Choice()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run here, or the reason why not."""
    return {name: why_not(name, None) for name in NAMES}


def why_not(name: str, device: torch.device | None) -> str | None:
    """The reason why a backend cannot run on ``device`` (None: on any device here).

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose one of auto, {', '.join(NAMES)}")
    reason: str | None = _module(name).why_not(device)
    return reason


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of everything that runs inside the ``with`` statement.

    It holds in the thread that enters it, and takes precedence over the environment
    variable ``VOVNET_FAST_BACKEND``.

    Args:
        name: ``auto`` or one of :data:`NAMES`.

    Raises:
        ValueError: there is no backend of that name.
        BackendError: it cannot run on this machine.
    """
    if name != "auto":
        reason = why_not(name, None)
        if reason is not None:
            raise BackendError(f"the {name} backend cannot run: {reason}")
    before, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = before


_SHAPES = {f"shapes of {name}": name for name in NAMES}
"""What :func:`shapes_only` chooses, and no user can."""


@contextlib.contextmanager
def shapes_only(name: str = "reference", needed: set[str] | None = None) -> Iterator[None]:
    """Let modules run as ops of a backend on meta tensors, which have shapes and no memory.

    What a fused path allocates and keeps can be counted so, on any machine. What a backend
    would launch has to be recorded (``kernels._common.recording``): it could not run.

    Args:
        name: of the backend.
        needed: receives the names of its functions that are asked for.
    """
    before = _choice.name, _choice.noted
    _choice.name, _choice.noted = f"shapes of {name}", needed
    try:
        yield
    finally:
        _choice.name, _choice.noted = before


def sees_shapes_only(choice: str) -> bool:
    """Whether :func:`shapes_only` made this choice."""
    return choice in _SHAPES


def chosen() -> str:
    """What was asked for: ``auto`` or a backend's name."""
    return _choice.name or os.environ.get(ENVIRONMENT) or "auto"


def fused(device: torch.device, dtype: torch.dtype, needs: tuple[str, ...]) -> bool:
    """Whether tensors of ``device`` go through the ops, and not through plain modules.

    With ``auto``, exported graphs are those of plain modules, which run anywhere.

    Args:
        device: of the tensors.
        dtype: of the activations; see :func:`select`.
        needs: functions that will be used; see :func:`select`.

    Raises:
        BackendError, ValueError: as :func:`select`.
    """
    name = chosen()
    if name == "auto":
        return not _exporting() and _automatic(device, dtype, needs) != "reference"
    if name == "reference":
        return False
    if not compat.is_compiling():  # Then the op itself asks, when it runs.
        select(device, dtype, needs)
    return True


def select(
    device: torch.device, dtype: torch.dtype, needs: tuple[str, ...], choice: str | None = None
) -> str:
    """Name of the backend that works on tensors of ``device``.

    ``auto`` takes the first whose functions have all been found right on such a device and in
    this dtype, checks those of which it is not known, and remembers on disk which passed.

    Args:
        device: of the tensors.
        dtype: of the activations. ``auto`` takes the reference for those that the check
            leaves out, which is fp64.
        needs: functions of the backend that will be used; what uses them says which. With none
            nothing is checked: the answer is then what ``auto`` would begin with.
        choice: what :func:`chosen` was, if not what it is now: a backward pass, which
            autograd runs in a thread of its own, goes by the choice of its forward pass.

    Raises:
        BackendError: the backend that was asked for cannot run on ``device``, or ``auto``
            has yet to check a function while a CUDA graph is being captured.
        ValueError: ``VOVNET_FAST_BACKEND`` names no backend, or another variable of the package
            says what it may not (:mod:`.._environment`).
    """
    name = choice or chosen()
    if name == "auto":
        return _automatic(device, dtype, needs)
    if name in _SHAPES:
        return _SHAPES[name]
    reason = why_not(name, device)
    if reason is not None:
        raise BackendError(f"the {name} backend cannot run on {device}: {reason}")
    return name


def get(
    device: torch.device, dtype: torch.dtype, needs: tuple[str, ...], choice: str | None = None
) -> ModuleType:
    """Module of the backend that works on tensors of ``device``; see :func:`select`."""
    if _choice.noted is not None:
        _choice.noted.update(needs)
    return _module(select(device, dtype, needs, choice))


def repeat(
    choice: str,
    key: Hashable,
    tensors: Sequence[torch.Tensor],
    work: Callable[[], list[torch.Tensor | None]],
) -> list[torch.Tensor | None]:
    """Results of a pass of a training step, by what is kept of passes like it if there is any.

    Args:
        choice: as for :func:`select`.
        key: all that the pass depends on beside its tensors.
        tensors: all that it reads and, if they are the caller's, writes.
        work: computes it. Each result is a tensor of its own, a view of one of ``tensors``, or
            None; which of these depends on nothing else either.
    """
    on_cpu = tensors[0].device.type == "cpu" and choice in ("auto", "cpu")
    if not on_cpu or _choice.noted is not None or not _cpu_repeats():
        return work()
    found: list[torch.Tensor | None] = _module("cpu").repeat((choice, key), tensors, work)
    return found


@functools.cache
def _cpu_repeats() -> bool:
    return why_not("cpu", None) is None


def _automatic(device: torch.device, dtype: torch.dtype, needs: tuple[str, ...]) -> str:
    """The backend that ``auto`` stands for."""
    tf32 = dtype == torch.float32 and device.type == "cuda" and tuning.tf32_allowed()
    return _settled(device, dtype, needs, tf32)


def _settled(device: torch.device, dtype: torch.dtype, needs: tuple[str, ...], tf32: bool) -> str:
    """The answer of :func:`_automatic`, the same for as long as the process lives."""
    return _decide(device, dtype, needs, tf32)


# torch.compile calls it while it traces, and takes the answer for a constant. This is what
# torch.compiler.assume_constant_result does, which would import all of torch._dynamo.
_settled._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _decide(device: torch.device, dtype: torch.dtype, needs: tuple[str, ...], tf32: bool) -> str:
    from .. import selfcheck  # It takes a third of the time of importing the package.

    _environment.require()
    refused = _module("_extension").loading.refused_isa() if device.type == "cpu" else None
    if refused is not None:  # Plain PyTorch in its place would be slower without a word.
        raise ValueError(refused)
    if dtype in selfcheck.DTYPES:
        for name in CANDIDATES.get(device.type, ()):
            if why_not(name, device) is None and _trusted(name, device, dtype, needs):
                return name
    return "reference"


def _trusted(name: str, device: torch.device, dtype: torch.dtype, needs: tuple[str, ...]) -> bool:
    """Whether a backend's functions are known, or now found, to be right on ``device``."""
    from .. import selfcheck

    verdict = selfcheck.remembered(name, device, dtype, needs)
    if verdict is not None:
        return verdict
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        kind = str(dtype).removeprefix("torch.")
        raise BackendError(
            f"functions of the {name} backend have not been checked on {device} in {kind} yet, "
            f"of {', '.join(needs)}, which cannot be done while a CUDA graph is being captured: "
            "run the model once before the capture, or choose a backend by name "
            f"({ENVIRONMENT} or use_backend)"
        )
    return selfcheck.trusted(name, device, dtype, needs)


def _exporting() -> bool:
    """Whether torch.export, or either exporter of ONNX, is tracing."""
    return torch.jit.is_tracing() or compat.is_exporting()


COMPILES = torch.__version__ >= "2.10"  # As versions: it is no plain string.
"""Whether torch.compile traces the ops. Older versions, which come without a Triton for the
kernels, do not know properties of named tuples: under ``auto`` they compile plain modules."""

if COMPILES:
    # As above. Up to torch 2.11 torch.compile itself takes is_exporting() for true.
    _exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
