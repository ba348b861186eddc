"""The compiled kernel that a launch needs: what it is made of, and its place in the cache.

Both are Triton's own: its launcher sorts the arguments, and its cache names the folder, so
that the launch itself will find the kernel there.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels._common import Launch
from ..kernels._triton import cache_folder
from ..kernels._variants import Variant, variant

_POINTED = re.compile(r"(?:\*|tensordesc<)(\w+)")


def arch_of(capability: tuple[int, int]) -> str:
    """``sm_90`` for compute capability 9.0."""
    return f"sm_{capability[0]}{capability[1]}"


class Job(NamedTuple):
    """One kernel to compile, in a form that another process can be given.

    Attributes:
        key: name of its folder in Triton's cache.
        name: of the kernel.
        module: where it is defined, as an attribute of that name.
        signature, constants, attributes: as in :class:`~vovnet_fast.kernels._variants.Variant`.
        options: of the compiler.
        arch: ``sm_90`` and so on.
    """

    key: str
    name: str
    module: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    arch: str

    def __str__(self) -> str:
        kinds = {kind for text in self.signature.values() for kind in _POINTED.findall(text)}
        names = list(self.signature)
        values = {names[i]: value for (i,), value in self.constants.items()}
        given = [f"{name}={value}" for name, value in values.items() if value is not None]
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        words = (self.name, "/".join(sorted(kinds)), f"warps={warps}", f"stages={stages}")
        return " ".join((*words, *given))

    def compile(self) -> Any:
        """Compile it into Triton's cache, if it is not there; returns Triton's compiled kernel.

        Raises:
            RuntimeError: the kernel would not be found under :attr:`key`.
            Exception: whatever Triton raises of what it cannot compile.
        """
        import triton

        kernel = getattr(importlib.import_module(self.module), self.name)
        source = _source(kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=target(self.arch), options=self.options)
        found = _folder_name(compiled.hash)
        if found != self.key:
            raise RuntimeError(
                f"{self.name} went to {found} of Triton's cache and is looked up in {self.key}: "
                "settings of triton.knobs do not reach other processes, set the environment "
                "variables of the same meaning"
            )
        return compiled


def different(launches: Iterable[Launch], arch: str) -> list[Job]:
    """The kernels that these launches need on ``arch``, each once, in order.

    Not in a process in which Triton interprets.
    """
    found: dict[str, Job] = {}
    for launch in launches:
        wanted = variant(launch)
        # Of its own, which takes a fraction of the time that Triton's takes.
        if wanted.key not in found:
            found[wanted.key] = _job(wanted, arch)
    return list({job.key: job for job in found.values()}.values())


def _job(wanted: Variant, arch: str) -> Job:
    from triton import knobs

    kernel = wanted.kernel
    options = {
        **wanted.options,
        # What the launcher adds.
        "debug": kernel.debug or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    parts = (wanted.signature, wanted.constants, wanted.attributes)
    key = _cache_key(_source(kernel, *parts), arch, options)
    return Job(key, kernel.fn.__name__, kernel.fn.__module__, *parts, options, arch)


def _source(kernel: Any, *parts: Any) -> Any:
    from triton.compiler import ASTSource

    return ASTSource(kernel, *parts)


@functools.cache
def target(arch: str) -> Any:
    """``sm_90`` as Triton names it."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@functools.cache
def _backend(arch: str) -> Any:
    from triton.compiler import make_backend

    return make_backend(target(arch))


def _cache_key(source: Any, arch: str, options: dict[str, Any]) -> str:
    """The folder in which ``triton.compile`` would look."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import get_cache_key

    backend = _backend(arch)
    parsed = backend.parse_options(dict(options))
    text = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return _folder_name(hashlib.sha256(text.encode()).hexdigest())


def _folder_name(digest: str) -> str:
    return base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")


def is_compiled(key: str, name: str, folder: Path) -> bool:
    """Whether a cache folder has a kernel."""
    return (folder / key / f"__grp__{name}.json").exists()


def missing(jobs: Iterable[Job], folder: Path) -> list[Job]:
    """Those that a cache folder does not have."""
    return [job for job in jobs if not is_compiled(job.key, job.name, folder)]


def compiled(jobs: Iterable[Job]) -> dict[str, str]:
    """Those that Triton's cache has: names by key."""
    folder = cache_folder()
    return {job.key: job.name for job in jobs if is_compiled(job.key, job.name, folder)}
