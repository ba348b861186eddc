"""What ``vovnet_fast._C`` is given is looked at before any pointer is followed.

Its functions are called as the backend calls them, but with some fields spoilt, in a process of
its own, so that a crash is a failure of the test. Fields are never spoilt so that they describe
memory that is there but belongs to somebody else, such as a row more: nobody in C++ can know.
"""

import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

from tests.extension_cases import CASES, Tensors, require
from vovnet_fast.arithmetic.layers import (
    QuantizedConv,
    QuantizedDepthwise,
    QuantizedGate,
    QuantizedSum,
)
from vovnet_fast.backends import _extension
from vovnet_fast.backends._extension import halves
from vovnet_fast.backends.cpu import (
    convolution,
    int8,
    int8_winograd,
    packing,
    unpacked,
    weight_grad,
    winograd,
)

CPU = torch.device("cpu")
REFUSALS = (TypeError, ValueError, OverflowError)
TIMES = 40  # Spoilt calls for each call of the backend, up to LIMIT for a function.
LIMIT = 600

NO_NUMBERS = (None, "x", 1.5, [], 2**63, -(2**63) - 1)
NO_SIZES = (-1, -(2**63), 2**40, 2**62, 2**63 - 1)
NO_CODES = (-1, 7, 99, 2**31 - 1, -(2**31), 2**31)
NO_ADDRESSES = (8, 4095, -1, 2**64, "x", 1.5, ())
NO_THREADS = (0, -1, 2**31 - 1, 2**31, 5000)

RANGES = {"levels", "limit", "most", "gate", "identity_gate"}
NO_RANGES = (-1, -(2**31), 2**31, *NO_NUMBERS)
FACTORS = {"eps", "factor", "mean_factor", "rescale", "step"}
BYTES = {"x", "out", "z", "identity", "weight", "zero"}
"""Of ops in eight bits: bytes lie anywhere."""

CODES = {"dtype", "kind", "relu", "stride", "pad"}
SIZES = {"n", "c", "c_in", "c_out", "add_c", "mask_c", "kernel", "tiles", "num_pixels"}
SIZES |= {"height", "width", "out_height", "out_width", "parts", "groups"}
SIZES |= {"stride_o", "stride_h", "stride_w", "stride_i", "x_stride_c"}
SIZES |= {"tile_h", "tile_w", "block_out", "stages"}

OF_SIZES = {"conv_parts", "conv_pack_bytes", "conv_weight_grad_parts"}
OF_SIZES |= {"reduction_parts", "merge_groups", "conv_winograd_pack_bytes"}
OF_SIZES |= {"int8_conv_parts", "int8_conv_pack_bytes"}
"""Functions of sizes alone."""


# --------------------------------------------------------------------------------------
# Spoilt arguments
# --------------------------------------------------------------------------------------


def spoil_address(rng, function, name, address):
    """Returns an address, and whether it must be refused."""
    bytes_ = name == "argmax" or (function.startswith("int8") and name in BYTES)
    kinds = [None, 0, *NO_ADDRESSES] + ([] if bytes_ or not address else [address + 1])
    spoilt = rng.choice(kinds)
    return spoilt, bool(address) and spoilt not in (None, 0)


def spoil(rng, function, name, value):
    """Another value of a field, and whether it must be refused."""
    if name in FACTORS:
        return rng.choice((float("nan"), float("inf"), -1.0)), False
    if isinstance(value, tuple) and len(value) == 2:
        if rng.random() < 0.5:
            return (value[0], rng.choice(NO_CODES)), bool(value[0])
        address, refused = spoil_address(rng, function, name, value[0])
        return (address, value[1]), refused
    if isinstance(value, tuple):
        where = rng.randrange(5)
        if where == 4:
            return value[:3], True
        if where == 0:
            address, refused = spoil_address(rng, function, name, value[0])
            return (address, *value[1:]), refused
        # Strides of axes with one element do not matter.
        return (*value[:where], rng.choice(NO_SIZES), *value[where + 1 :]), False
    if name in CODES or (name == "kernel" and "conv" in function):
        return rng.choice(NO_CODES + NO_NUMBERS), True
    if is_address(function, name):
        return spoil_address(rng, function, name, value)
    if name in RANGES:
        return rng.choice(NO_RANGES), True
    return (0, False) if rng.random() < 0.2 else (rng.choice(NO_SIZES + NO_NUMBERS), True)


def is_address(function, name):
    if name == "tiles":
        return function in ("conv", "conv_winograd", "int8_conv")
    return name not in SIZES | RANGES | FACTORS


class Spoiling:
    """A half of the extension: calls its functions wrongly, and then as it was asked to.

    The first argument of the CPU half's is a number of threads, that of the other any stream.
    """

    def __init__(self, half, seed, note, *, threads=True):
        self._half, self._random, self._note = half, random.Random(seed), note
        self._threads = threads
        self.calls, self.refused, self.words = Counter(), Counter(), set()

    def __getattr__(self, name):
        found = getattr(self._half, name)
        if name in OF_SIZES:
            return lambda *given: self._sizes(name, found, given)
        if name.endswith("_engines") or name in ("conv_winograd_runs", "conv_unpacked_runs"):
            return found
        return lambda *given, **fields: self._fields(name, found, given, fields)

    def _try(self, name, words, call, must_refuse):
        self._note(f"{name}: {words}")
        self.calls[name] += 1
        try:
            call()
        except REFUSALS as error:
            self.refused[name] += 1
            self.words.add(str(error))
        else:
            assert not must_refuse, f"{name} took {words}"

    def _sizes(self, name, found, given):
        for _ in range(TIMES):
            spoilt = list(given)
            where = self._random.randrange(len(given))
            other = self._random.choice(("", "fma9", *NO_SIZES, *NO_NUMBERS))
            spoilt[where] = other
            self._try(name, spoilt, lambda now=spoilt: found(*now), True)
        for _ in range(TIMES):  # What is legal must not crash either.
            spoilt = [
                each if isinstance(each, str) else self._random.choice((0, 1, each, 2**20, 2**39))
                for each in given
            ]
            self._try(name, spoilt, lambda now=spoilt: found(*now), False)
        return found(*given)

    def _fields(self, name, found, given, fields):
        for _ in range(TIMES if self.calls[name] < LIMIT else 0):
            spoilt, must_refuse, threads = dict(fields), False, given[0]
            kind = self._random.random()
            if kind < 0.05:
                del spoilt[self._random.choice(list(fields))]
                must_refuse = True
            elif kind < 0.1:
                spoilt["more"], must_refuse = 1, True
            elif kind < 0.15 and self._threads:
                threads, must_refuse = self._random.choice(NO_THREADS), True
            else:
                for field in self._random.sample(list(fields), self._random.choice((1, 1, 1, 2))):
                    if fields[field] is None:  # Something for what is absent: it has no memory.
                        continue
                    spoilt[field], refused = spoil(self._random, name, field, fields[field])
                    must_refuse |= refused
            sizes = [v for k, v in fields.items() if not is_address(name, k)]
            if kind > 0.15 and (0 in sizes or any(spoilt.get(k) == 0 for k in SIZES)):
                must_refuse = False  # There may be no memory to look at.
            arguments = (threads, *given[1:])
            self._try(
                name,
                f"{threads} {spoilt}",
                lambda a=arguments, f=spoilt: found(*a, **f),
                must_refuse,
            )
        return found(*given, **fields)


def fuzz(seed, path):
    """In a process of its own: what is being called is in the file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    half = _extension.load("cpu")
    spoiling = Spoiling(half, seed, lambda text: os.pwrite(file, f"{text}\n".encode(), 0))
    torch.manual_seed(0)
    torch.set_num_threads(2)
    kernels = halves.Ops(lambda: spoiling, halves._threads)
    convolution._extension.load = lambda half: spoiling
    for case in CASES:
        if case.words and "17, 31" in case.words:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            list(case.call(kernels, Tensors(dtype, dtype, CPU)))
    for engine in spoiling.conv_engines():
        for dtype in (torch.float32, torch.bfloat16):
            if engine in convolution.PREFERRED.get(dtype, ()) or engine == "fma":
                x, weight = (
                    torch.rand(1, 5, 7, 8, dtype=dtype),
                    torch.rand(24, 3, 3, 8, dtype=dtype),
                )
                out, scale = torch.empty(1, 5, 7, 24, dtype=dtype), torch.rand(24)
                options = dict(stride=1, relu=True, pool=True)
                behind = weight[:, :1, :1].contiguous()  # A depthwise convolution.
                taps = torch.rand(3, 3, 8, dtype=dtype)
                for _ in range(8):
                    convolution.run_engine(engine, x, weight, scale, scale, out, **options)
                    packing.forget([weight])
                for _ in range(4):
                    convolution.run_engine(
                        engine,
                        x,
                        behind,
                        scale,
                        scale,
                        out,
                        **{**options, "pool": False},
                        taps=taps,
                    )
                    packing.forget([behind])
    for engine in winograd.SIDES if spoiling.conv_winograd_runs() else ():
        x, weight, scale = torch.rand(1, 5, 7, 8), torch.rand(24, 3, 3, 8), torch.rand(24)
        for _ in range(8):
            out, options = torch.empty(1, 5, 7, 24), dict(stride=1, relu=True, pool=False)
            convolution.run_engine(engine, x, weight, scale, scale, out, **options)
            packing.forget([weight])
    for kernel in (1, 3) if spoiling.conv_unpacked_runs() else ():
        for dtype in (torch.float32, torch.bfloat16):
            x, g = (torch.rand(1, 3, 4, c, dtype=dtype) for c in (20, 24))
            weight, scale = torch.rand(24, 20, kernel, kernel).permute(0, 2, 3, 1), torch.rand(24)
            for _ in range(4):
                options = dict(stride=1, relu=True, pool=True)
                unpacked.conv(x, weight, scale, scale, torch.empty_like(g), **options)
                unpacked.input_grad(g, weight, scale, torch.empty_like(x), stride=1, add=x, mask=x)
                unpacked.weight_grad(x, g, weight, scale, stride=1)
    for engine in spoiling.conv_weight_grad_engines():
        for kernel in (1, 3):
            for dtype in (torch.float32, torch.bfloat16) if engine == "fma" else (torch.bfloat16,):
                for c_in in (3, 40):  # In parts, and not.
                    x, g = (torch.rand(1, 20, 25, c, dtype=dtype) for c in (c_in, 112))
                    products = weight_grad.sums(engine, x, g, kernel)
                    scale = torch.rand(112)
                    weight_grad._finish(engine, products, torch.rand_like(products), scale)
    eight_bits(spoiling)
    bound = {name for name in dir(half) if not name.startswith("_") and name not in OTHERS}
    if not spoiling.conv_engines():
        bound = {name for name in bound if not name.startswith("conv")}
    if not spoiling.int8_conv_engines():
        bound = {name for name in bound if not name.startswith("int8_conv")}
    assert bound <= set(spoiling.calls), bound - set(spoiling.calls)
    assert all(spoiling.words)
    assert all(spoiling.refused[name] > 20 for name in bound), spoiling.refused


def eight_bits(spoiling):
    """Calls of ops in eight bits."""
    for _ in range(3):
        x, out = (torch.randint(0, 128, (1, 6, 7, 16), dtype=torch.uint8) for _ in range(2))
        feature, numbers = torch.empty(1, 6, 7, 16), torch.rand(16)
        weight = torch.randint(-9, 9, (16, 3, 3, 16), dtype=torch.int8)
        rest = torch.ones(16, dtype=torch.int32), numbers, numbers, 1, None, numbers, None, 1.0
        for engine in spoiling.int8_conv_engines():
            images = engine == int8.WORDS
            steps = x.view(torch.int8) if images else x
            layer = QuantizedConv(weight.clone(), *rest)
            options = dict(levels=127, feature=feature, pool=engine not in int8_winograd.NAMES)
            int8.run_engine(engine, steps, layer, out, **options)
        sums = torch.ones(1, 2, 16, dtype=torch.int32)
        table = torch.ones(2048, dtype=torch.int32)
        fc = torch.ones(16, 16, dtype=torch.int16), rest[0], numbers, 64, 99.0
        gates = int8.gates(sums, 42, QuantizedGate(*fc, "hard_sigmoid", None))
        int8.gates(sums, 42, QuantizedGate(*fc, "sigmoid", table))
        ends = QuantizedSum(9.0, 9.0, 15, 0.1)
        int8.apply_gates(x, gates, x, ends, out, levels=127, feature=feature)
        spatial = QuantizedDepthwise(weight[0, :, :], numbers, x[0, 0, 0], numbers, numbers)
        int8.depthwise(x, spatial, out, levels=127)
        int8.max_pool(x, out[:, :3, :3], "ceil")
        int8.quantize_image(feature.permute(0, 1, 3, 2), 0.1, out.new_empty(1, 6, 16, 7).char())


OTHERS = {
    "Recording",
    "conv_engines",
    "int8_conv_engines",
    "conv_winograd_runs",
    "conv_unpacked_runs",
    "fingerprint",
    "conv_weight_grad_engines",
    "isa",
    "isas",
    "use_isa",
}
"""Bound too: what has no arguments that matter, and what has its own tests."""


def run_python(code):
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(autouse=True)
def _built():
    require("cpu")


@pytest.fixture
def extension():
    return _extension.load("cpu")


def test_no_arguments_crash_it(tmp_path):
    last = tmp_path / "last"
    said = run_python(f"from tests.csrc import test_binding as t; t.fuzz(0, {str(last)!r})")
    words = last.read_text()[:3000].splitlines()[:1] if last.exists() else ""
    assert said.returncode == 0, f"exit {said.returncode} of {words}\n{said.stderr[-3000:]}"


# --------------------------------------------------------------------------------------
# What the refusals say
# --------------------------------------------------------------------------------------


def sums(**changed):
    """Fields of ``channel_sums`` of one pixel."""
    memory = [torch.ones(4) for _ in range(3)]
    g, partials, out = (each.data_ptr() for each in memory)
    fields = dict(g=(g, 4, 4, 4), partials=partials, out=out, n=1, height=1, width=1, c=4, parts=1)
    return memory, {**fields, "dtype": 2, **changed}


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (ValueError, "out must be the address of a tensor, got None or 0", dict(out=None)),
        (ValueError, "out must be the address of a tensor, got 64", dict(out=64)),
        (ValueError, "partials must be an address that is a multiple of 4, got", dict(partials=1)),
        (ValueError, "c must be at least 0, got -1", dict(c=-1)),
        (OverflowError, r"height must be less than 2\^40, got", dict(height=2**62)),
        (OverflowError, "g must be a tensor that memory has room for", dict(n=2**39, c=2**39)),
        (ValueError, "parts must be at least 1 where images have pixels", dict(parts=0)),
        (ValueError, "dtype must be the code of a dtype, from 0 to 3, got 9", dict(dtype=9)),
        (OverflowError, "argument c has a wrong type: .* is not an integer of 64", dict(c=2**70)),
        (TypeError, "argument g has a wrong type: 'x' is not .address, stride_n", dict(g="x")),
    ],
)
def test_a_refusal_names_the_field(extension, error, words, changed):
    memory, fields = sums()
    extension.channel_sums(1, **fields)
    assert memory[2].tolist() == [1.0] * 4
    if changed.get("partials"):
        changed = dict(partials=fields["partials"] + 1)
    with pytest.raises(error, match=f"channel_sums: {words}" if "argument" not in words else words):
        extension.channel_sums(1, **{**fields, **changed})


def test_strides_of_what_is_repeated_do_matter(extension):
    _memory, fields = sums()
    first = fields["g"][0]
    extension.channel_sums(1, **{**fields, "g": (first, 2**62, -1, 2**62)})  # One pixel.
    for stride, error in ((-4, ValueError), (2**41, OverflowError)):
        with pytest.raises(error, match="g must be a view whose strides"):
            extension.channel_sums(1, **{**fields, "n": 2, "g": (first, stride, 4, 4)})


def test_threads_are_counted(extension):
    _memory, fields = sums()
    for number in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"threads must be from 1 to 4096, got {number}"):
            extension.channel_sums(number, **fields)


def test_an_engine_takes_its_own_dtypes(extension):
    for engine in extension.conv_engines():
        with pytest.raises(ValueError, match="no kernel for the dtype with code 3"):
            extension.conv_pack(
                1, engine, weight=None, scale=None, out=None, c_out=0, kernel=1, c_in=0,
                stride_o=0, stride_h=0, stride_w=0, stride_i=0, transposed=0, dtype=3,
            )  # fmt: skip
    with pytest.raises(ValueError, match='no convolution engine "bogus"'):
        extension.conv_pack_bytes("bogus", 1, 1, 1)
