"""At the first use of a network, what it is about to launch is compiled on all cores.

What was found out is noted in Triton's cache, so that a process that finds everything
compiled need not find it out again. It is an optimisation: whatever goes wrong is said
once, and Triton compiles each kernel when it meets it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends, tuning
from .._files import read_text, replacing
from ..backends import eight_bits
from ..compiling import side_by_side
from ..compiling.side_by_side import say_once
from ..specs import VoVNetSpec

if TYPE_CHECKING:
    from ..kernels._common import Launch
    from .rehearsal import Plan, Setting

_lock = threading.Lock()
_met: set[Hashable] = set()


def of_model(model: Any, x: Tensor, dtype: torch.dtype) -> None:
    """Compile what ``model(x)`` of a :class:`vovnet_fast.VoVNet` will launch, if it is new.

    Args:
        model: the model.
        x: images on a GPU.
        dtype: of activations.
    """
    if type(x) is not Tensor or model.first_weight is None:
        return

    def plan(setting: Setting) -> Plan:
        from . import rehearsal

        images = rehearsal.on_meta(x).to(dtype).requires_grad_(x.requires_grad)
        return rehearsal.of_model(rehearsal.twin(model), images, setting)

    once(key_of_model(model, x, dtype), x.device, dtype, plan)


def key_of_model(model: Any, x: Tensor, dtype: torch.dtype) -> tuple[Hashable, ...]:
    """What decides which kernels a model launches; sizes of images count by octaves."""
    modes = (model.training, model.norm_eval, model.frozen_stages, model.with_cp)
    parameter = model.first_weight
    gradient = torch.is_grad_enabled() and (x.requires_grad or parameter.requires_grad)
    layout = (model._encoded_spec, model.input_ch, model.out_features, parameter.dtype)
    return ("model", *layout, *modes, gradient, dtype, _octave(x))


def of_frozen(model: Any, x: Tensor) -> None:
    """The same for a :class:`vovnet_fast.FrozenVoVNet`."""
    if type(x) is not Tensor:
        return

    def plan(setting: Setting) -> Plan:
        from . import rehearsal

        params = rehearsal.twin(model)._unpack()
        images = rehearsal.on_meta(x).to(model.dtype)
        return rehearsal.of_params(params, images, model.out_features, setting)

    once(key_of_frozen(model, x, model.dtype), x.device, model.dtype, plan)


def key_of_frozen(model: Any, x: Tensor, dtype: torch.dtype) -> tuple[Hashable, ...]:
    """The same of a frozen model, or of one that is going to be frozen in ``dtype``."""
    return ("frozen", model._encoded_spec, model.out_features, dtype, _octave(x))


def key_of_quantized(architecture: Any, x: Tensor) -> tuple[Hashable, ...]:
    """The same of a :class:`vovnet_fast.quantization.layout.Architecture`."""
    spec, form, *others = architecture
    return ("quantized", _encoded(spec), *form, *others, _octave(x))


@functools.cache  # Asked for at every call.
def _encoded(spec: VoVNetSpec) -> str:
    return spec.encode()


def _octave(x: Tensor) -> int:
    return (x.shape[0] * x.shape[2] * x.shape[3]).bit_length()


def once(
    key: tuple[Hashable, ...],
    device: torch.device,
    dtype: torch.dtype,
    plan: Callable[[Setting], Plan],
) -> None:
    """Compile for what is new in this process, if Triton's backend will run it.

    Args:
        key: of the network, in its mode.
        device: where it runs.
        dtype: of activations, or their bytes.
        plan: says what it needs; see :func:`ahead`.

    Raises:
        ValueError: ``VOVNET_FAST_COMPILE_WORKERS`` is no number.
    """
    seen = (device, backends.chosen(), *key)
    if seen in _met or torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        if seen in _met:
            return
        _met.add(seen)
        if not _will_run_triton(device, dtype):
            return
        from ..compiling import workers
        from .rehearsal import Setting

        if workers.count() == 0:
            return
        try:
            check = dtype if backends.chosen() == "auto" else None
            ahead(key, Setting.here(device), plan, check)
        except Exception as error:
            say_once(f"{type(error).__name__}: {error}")


def ahead(
    key: tuple[Hashable, ...],
    setting: Setting,
    plan: Callable[[Setting], Plan],
    check: torch.dtype | None,
) -> bool:
    """Compile what a network needs, unless it is noted that all of it is there.

    Args:
        key: of the network, in its mode.
        setting: where it will run.
        plan: says what it needs, in a thread of its own.
        check: the self-check of the functions that it uses will run, too, in this dtype.

    Returns:
        whether it had to be found out.

    Raises:
        Exception: whatever went wrong.
    """
    from .rehearsal import self_check

    noted = Note(key, setting)
    if noted.holds():
        return False
    gradient = torch.is_grad_enabled()

    def launches() -> list[Launch]:
        with torch.set_grad_enabled(gradient):
            found = plan(setting)
        if check is None:
            return found.launches
        return found.launches + self_check(found.functions, check, setting.target)

    # A thread of its own knows nothing of the caller's modes.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        found = thread.submit(launches).result()
        noted.write(side_by_side.compile_launches(found, setting.target.capability))
    return True


def _will_run_triton(device: torch.device, dtype: torch.dtype) -> bool:
    name = backends.chosen()
    if name not in ("auto", "triton") or backends.why_not("triton", device) is not None:
        return False
    from .. import selfcheck
    from ..kernels._common import interpreted
    from ..selfcheck.eight_bits import FORMS

    if interpreted():
        return False
    if dtype in FORMS:
        return eight_bits.find("triton", device, FORMS[dtype], ())[1] is None
    return name == "triton" or dtype in selfcheck.DTYPES


class Note:
    """A file in Triton's cache that says which kernels a network launches, and that they are there.

    One for a machine that measures engines will do for one that does not.

    Args:
        key: of the network.
        setting: where it runs.
    """

    def __init__(self, key: tuple[Hashable, ...], setting: Setting) -> None:
        from triton.runtime.cache import triton_key

        from ..compiling import cache
        from ..kernels._triton import cache_folder

        self._folder = cache_folder()
        own = setting.planning.measured
        parts = (key, setting.target.capability, tuning.tf32_allowed(), cache.sources())

        def path(measured: bool) -> Path:
            text = repr((*parts, measured, triton_key()))
            digest = hashlib.sha256(text.encode()).hexdigest()[:24]
            return self._folder / f"{cache.MARKER}{digest}.json"

        self._path, self._paths = path(own), {path(own), path(True)}

    def holds(self) -> bool:
        """Whether the note is there, and all that it names."""
        return any(map(self._names_what_is_there, self._paths))

    def _names_what_is_there(self, path: Path) -> bool:
        from ..compiling.jobs import is_compiled

        try:
            found = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(found, dict) or not all(isinstance(n, str) for n in found.values()):
            return False
        return all(is_compiled(key, name, self._folder) for key, name in found.items())

    def write(self, kernels: dict[str, str]) -> None:
        """Note that these are all.

        Raises:
            OSError: the cache cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as temporary:
            Path(temporary).write_text(json.dumps(kernels, sort_keys=True), encoding="utf-8")
