"""Which compiled kernel a launch needs, without a GPU: Triton's own specialisation.

A ``triton.jit`` function is compiled once for each variant of its arguments: their types,
its ``tl.constexpr`` values, and what Triton assumes of the others, that an address is a
multiple of 16 bytes, say. Launches of one variant share a compiled kernel, in memory and in
Triton's cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from triton.runtime.jit import JITFunction, create_function_from_signature

from ._common import Launch
from ._triton import interpreted, packed


class Variant(NamedTuple):
    """What one compiled kernel is made of.

    Attributes:
        kernel: the ``triton.jit`` function.
        signature: types of the arguments by name.
        constants: values of those that are compile-time ones, by position.
        attributes: what may be assumed of the others, by position.
        options: of the compiler, without its defaults.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    @property
    def key(self) -> str:
        """A text that is the same for launches that share a compiled kernel, and no others."""
        assumed = self.attributes
        if isinstance(assumed, dict):  # It is an object in Triton 3.2.
            assumed = {position: found for position, found in assumed.items() if found}
        parts = (list(self.signature.items()), self.constants, assumed, self.options)
        return f"{self.kernel.fn.__module__}.{self.kernel.fn.__qualname__} {parts}"

    def compile(self, arch: str) -> Any:
        """Compile for ``arch``, such as ``sm_90``; returns Triton's compiled kernel.

        Raises:
            RuntimeError: the process runs Triton's interpreter.
        """
        import triton
        from triton.compiler import ASTSource

        if interpreted():
            raise RuntimeError(
                "nothing is compiled while Triton interprets: unset TRITON_INTERPRET and start anew"
            )
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=_target(arch), options=self.options)


def variant(launch: Launch) -> Variant:
    """The variant that a launch needs: as Triton finds it out when it runs."""
    kernel, binder = _compiled(launch.kernel)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    arguments = {**launch.args, **launch.constants}
    # The architecture does not matter here: it has to be one that there is.
    return Variant(kernel, *packed(kernel, _backend(), binder, arguments, options), options)


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@functools.cache
def _backend() -> Any:
    from triton.compiler import make_backend

    return make_backend(_target("sm_90"))


@functools.cache
def _compiled(kernel: Any) -> tuple[Any, Any]:
    """A kernel as Triton compiles it, interpreted or not, and what sorts its arguments."""
    if interpreted():
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    return kernel, create_function_from_signature(kernel.signature, kernel.params, _backend())
