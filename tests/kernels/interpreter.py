"""Triton's interpreter without what it does again and again: the same, in a third of the time.

Most of what it does for a kernel changes no result. It is left as it is where its insides are not
those that were looked at, in other versions of Triton.
"""

import contextlib
import dataclasses
import functools
from types import ModuleType

TRIED = ("3.6.", "3.7.")
"""Versions whose interpreter has what is replaced here."""

_replaced = []
"""Objects, names of their attributes, what was there, and what is now."""


def hasten():
    """Replace it for this process, unless it is; whether the version is one that was tried."""
    import triton

    if not triton.__version__.startswith(TRIED):
        return False
    from triton.runtime import interpreter

    if not _replaced:
        for replacements in (
            _leave_out_checks_that_nobody_reads,
            _replace_the_language_once_a_launch,
            _remember_dtypes,
            _remember_shapes,
        ):
            for thing, name, new in replacements(interpreter):
                _replaced.append((thing, name, getattr(thing, name), new))
                setattr(thing, name, new)
    return True


@contextlib.contextmanager
def as_released():
    """The interpreter as Triton has it."""
    for thing, name, old, _ in _replaced:
        setattr(thing, name, old)
    try:
        yield
    finally:
        for thing, name, _, new in _replaced:
            setattr(thing, name, new)


def _leave_out_checks_that_nobody_reads(interpreter):
    """Each sum of integers is made again in 64 bits and compared, for assertions of debug mode.

    The interpreter is never in debug mode: these are dropped once everything has been computed.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    yield builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)


def _replace_the_language_once_a_launch(interpreter):
    """Functions that kernels call look through all of triton.language, at each call.

    What they replace there has been replaced by the same since the launch began.
    """
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    launches = []

    @functools.cache
    def names(fn):
        """Of the modules that it would look through."""
        language = interpreter.tl
        modules = (v for v in fn.__globals__.values() if isinstance(v, ModuleType))
        return frozenset(m.__name__ for m in modules if m in (language, language.core))

    def patch_lang(fn):
        if launches and names(fn) and names(fn) <= launches[-1]:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if launches:
            launches[-1].update(names(fn))
        return scope

    @functools.wraps(call)
    def launch(executor, *args, **kwargs):
        launches.append(set())
        try:
            return call(executor, *args, **kwargs)
        finally:
            launches.pop()

    yield interpreter, "_patch_lang", patch_lang
    yield interpreter.GridExecutor, "__call__", launch


def _remember_dtypes(interpreter):
    """The table of NumPy's dtypes is written anew for each question."""
    ask, language = interpreter._get_np_dtype, interpreter.tl
    known = {}

    def get_np_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        if isinstance(element, language.pointer_type):
            return ask(element)
        if element.name not in known:
            known[element.name] = ask(element)
        return known[element.name]

    yield interpreter, "_get_np_dtype", get_np_dtype


def _remember_shapes(interpreter):
    """Shapes are taken apart, checked, wrapped and printed for each block and each tensor."""
    core = interpreter.tl.core
    of_block, of_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, tensors = {}, {}

    def plain(shape):
        """Its numbers; None for what is no shape."""
        if not isinstance(shape, (list, core.tuple)):
            return None
        numbers = tuple([n.value if isinstance(n, core.constexpr) else n for n in shape])
        return numbers if {*map(type, numbers)} <= {int} else None

    def block_init(self, element_ty, shape):
        key = plain(shape)
        if key in blocks:
            self.element_ty = element_ty
            self.shape, self.numel, written = blocks[key]
            self.name = f"<{written}, {element_ty}>"
            return
        of_block(self, element_ty, shape)  # Raises what is wrong with the shape.
        if key is not None:
            blocks[key] = (self.shape, self.numel, str(self.shape))

    def tensor_init(self, handle, type):
        key = plain(type.shape) if type.is_block() else ()
        if key in tensors:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = tensors[key]
            return
        of_tensor(self, handle, type)
        if key is not None:
            tensors[key] = (self.shape, self.numel)

    yield core.block_type, "__init__", block_init
    yield core.tensor, "__init__", tensor_init
