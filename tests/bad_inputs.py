"""What users get wrong, over all public entries, and what they must be told.

Each row: the entry, what is wrong, a call of the entry, the exception, and words that its text must
have. Rows of files and of caches are with the tests of those rooms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

import vovnet_fast
from tests.tiny import TINY
from vovnet_fast import FrozenVoVNet, VoVNet, freeze, ops, specs
from vovnet_fast.network.norms import build_norm

SPEC = TINY["detectron2"]


class Subjects(NamedTuple):
    """What rows call: they must not change it."""

    model: VoVNet
    frozen: FrozenVoVNet


class Row(NamedTuple):
    entry: str
    wrong: str
    call: Callable[[Subjects], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    words: str


def rows() -> list[Row]:
    return [*_images(), *_models(), *_specs(), *_norms(), *_ops(), *_freezing(), *_backends()]


def image(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape or (1, 3, 40, 40), **options)


IMAGES: dict[str, tuple[Callable[[], Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    "None": (lambda: None, TypeError, "None"),
    "an array": (lambda: numpy.zeros((1, 3, 40, 40), "f"), TypeError, "ndarray"),
    "a list": (lambda: [image()], TypeError, "list"),
    "a tuple of images": (lambda: (image(), image()), TypeError, "tuple"),
    "a scalar": (lambda: torch.tensor(1.0), ValueError, r"\[\]"),
    "a vector": (lambda: image(3), ValueError, r"\[3\]"),
    "a matrix": (lambda: image(40, 40), ValueError, r"\[40, 40\]"),
    "one image": (lambda: image(3, 40, 40), ValueError, r"\[3, 40, 40\]"),
    "a clip": (lambda: image(1, 3, 2, 40, 40), ValueError, r"\[1, 3, 2, 40, 40\]"),
    "grey": (lambda: image(1, 1, 40, 40), ValueError, r"channels.*\[1, 1, 40, 40\]"),
    "four channels": (lambda: image(1, 4, 40, 40), ValueError, r"channels.*\[1, 4, 40, 40\]"),
    "no channel": (lambda: image(1, 0, 40, 40), ValueError, r"channels.*\[1, 0, 40, 40\]"),
    "channels last": (lambda: image(1, 40, 40, 3), ValueError, r"channels.*\[1, 40, 40, 3\]"),
    "integers": (lambda: image(dtype=torch.int64), TypeError, "int64"),
    "bytes": (lambda: image(dtype=torch.uint8), TypeError, "uint8"),
    "truth": (lambda: image(dtype=torch.bool), TypeError, "bool"),
    "complex": (lambda: image(dtype=torch.complex64), TypeError, "complex64"),
    "fp8": (lambda: image(dtype=torch.float8_e5m2), TypeError, "float8_e5m2"),
    "no pixel": (lambda: image(1, 3, 0, 40), ValueError, "0x40"),
    "no column": (lambda: image(1, 3, 40, 0), ValueError, "40x0"),
    "too small": (lambda: image(1, 3, 4, 4), ValueError, "4x4.*too small"),
    "sparse": (lambda: image().to_sparse(), (TypeError, ValueError), "sparse"),
    "on meta": (lambda: image(device="meta"), (ValueError, RuntimeError), "meta"),
}


def _images() -> list[Row]:
    found = []
    for wrong, (make, error, words) in IMAGES.items():
        found.append(Row("model(x)", wrong, lambda s, m=make: s.model(m()), error, words))
        found.append(Row("frozen(x)", wrong, lambda s, m=make: s.frozen(m()), error, words))
        found.append(
            Row("features", wrong, lambda s, m=make: features(s, m()), error, words.split(".*")[-1])
        )
    found.append(Row("model(x)", "fp64 for fp32", lambda s: s.model(image().double()), TypeError,
                     "torch.float64.*torch.float32"))  # fmt: skip
    found.append(Row("model(x)", "fp16 for fp32", lambda s: s.model(image().half()), TypeError,
                     "torch.float16.*torch.float32"))  # fmt: skip
    found.append(Row("frozen(x)", "a gradient", lambda s: s.frozen(image(requires_grad=True)),
                     RuntimeError, "backward"))  # fmt: skip
    return found


@torch.no_grad()
def features(s: Subjects, x: Any, wanted: Any = ("stage4", "stage5")) -> Any:
    return ops.features(x, s.model.fold(torch.float32), wanted)


def _models() -> list[Row]:
    def made(wrong: str, error: Any, words: str, *args: Any, **options: Any) -> Row:
        return Row("VoVNet", wrong, lambda _: VoVNet(*args, **options), error, words)

    spec: Any = SPEC
    return [
        made("unknown", specs.UnknownSpecError, "V-39", "V-38-eSE"),
        made("empty name", specs.UnknownSpecError, "V-39", ""),
        made("a number", (TypeError, KeyError), "38", 38),
        made("None", (TypeError, KeyError), "None", None),
        made("input_ch 0", ValueError, "input_ch.*0", spec, 0),
        made("input_ch -3", ValueError, "input_ch.*-3", spec, -3),
        made("frozen_stages 5", ValueError, "frozen_stages.*5", spec, frozen_stages=5),
        made("frozen_stages -2", ValueError, "frozen_stages.*-2", spec, frozen_stages=-2),
        made("an unknown feature", ValueError, "stage6", spec, out_features=("stage6",)),
        made("no feature", ValueError, "out_features", spec, out_features=()),
        made("a feature twice", ValueError, "once", spec, out_features=("stage4", "stage4")),
        made("a string of features", ValueError, "'stage4'", spec, out_features="stage4"),
        made("an index of 4", ValueError, "out_indices", spec, out_indices=(4,)),
        made("an index of -1", ValueError, "out_indices", spec, out_indices=(-1,)),
        made("both", ValueError, "both", spec, out_features=("stem",), out_indices=(0,)),
        made("two names", ValueError, "model_name", "V-57-eSE", model_name="V-99-eSE"),
        made("unknown model_name", specs.UnknownSpecError, "V-", model_name="V-1"),
        made("an unknown norm", ValueError, "norm_cfg.*'IN'", spec, norm_cfg=dict(type="IN")),
        made("a norm without type", ValueError, "norm_cfg.*None", spec, norm_cfg=dict(eps=1e-3)),
        made("groups", ValueError, "num_groups=7", spec, norm_cfg=dict(type="GN", num_groups=7)),
        made("an option", TypeError, "epsilon", spec, norm_cfg=dict(type="BN", epsilon=1)),
        made("an unknown argument", TypeError, "depth", spec, depth=39),
    ]


def _specs() -> list[Row]:
    def spec(wrong: str, error: Any, words: str, **changes: Any) -> Row:
        return Row("VoVNetSpec", wrong, lambda _: replace(SPEC, **changes), error, words)

    four = dict(mid_channels=(8, 8, 16, 16))
    return [
        spec("three stages", ValueError, "mid_channels", mid_channels=(8, 8, 16)),
        spec("no channels", ValueError, "mid_channels", mid_channels=(0, 8, 16, 16)),
        spec("negative channels", ValueError, "out_channels", out_channels=(16, -24, 32, 40)),
        spec("no layers", ValueError, "layers_per_block", layers_per_block=0),
        spec("no blocks", ValueError, "blocks_per_stage", blocks_per_stage=(0, 1, 1, 1)),
        spec("two stem layers", ValueError, "stem_channels", stem_channels=(8, 16)),
        spec("a stem stride of 0", ValueError, "stem_strides", stem_strides=(0, 1, 2)),
        spec("a stem stride of 3", ValueError, "stem_strides.*3", stem_strides=(3, 1, 2)),
        spec("a pooled stage of 9", ValueError, "first_pooled_stage", first_pooled_stage=9),
        spec("an unknown pool", ValueError, "pool.*'avg'", pool="avg"),
        spec("an unknown gate", ValueError, "gate.*'relu'", gate="relu"),
        spec("an unknown placement", ValueError, "ese.*'first'", ese="first"),
        spec("an unknown identity", ValueError, "identity.*'all'", identity="all"),
        spec("an unknown init", ValueError, "init.*'zeros'", init="zeros"),
        spec("an unknown dialect", ValueError, "dialect.*'keras'", dialect="keras"),
        spec("a pooled stage of 1", ValueError, "first_pooled_stage", first_pooled_stage=1),
        spec("no name", ValueError, "name", name=""),
        spec("a name that is none", ValueError, "name", name=None),
        spec("half a channel", ValueError, "mid_channels", mid_channels=(8.0, 8, 16, 16)),
        spec("truth for layers", ValueError, "layers_per_block.*True", layers_per_block=True),
        spec("words for truth", ValueError, "depthwise.*'no'", depthwise="no"),
        Row("VoVNetSpec", "an unknown field", lambda _: replace(SPEC, width=2), TypeError, "width"),
        Row("VoVNetSpec", "strings", lambda _: replace(SPEC, **dict(four, mid_channels="8888")),
            (ValueError, TypeError), "mid_channels"),
        Row("specs.get", "unknown", lambda _: specs.get("vov"), specs.UnknownSpecError, "vov"),
    ]  # fmt: skip


def _norms() -> list[Row]:
    def norm(wrong: str, error: Any, words: str, cfg: Any, channels: int = 8) -> Row:
        return Row("build_norm", wrong, lambda _: build_norm(cfg, channels), error, words)

    return [
        norm("unknown", ValueError, "'LN'", dict(type="LN")),
        norm("no type", ValueError, "None", {}),
        norm(
            "groups that do not divide", ValueError, "num_groups=3", dict(type="GN", num_groups=3)
        ),
        norm("unknown option", TypeError, "alpha", dict(type="BN", alpha=1)),
        norm("groups of a batch norm", TypeError, "num_groups", dict(type="BN", num_groups=2)),
    ]


def _layer(c_in: int = 4, c_out: int = 8, kernel: int = 3, **changes: Any) -> ops.ConvParams:
    weight, ones = torch.ones(c_out, kernel, kernel, c_in), torch.ones(c_out)
    return ops.ConvParams(weight, ones, ones)._replace(**changes)


def _block(**changes: Any) -> ops.BlockParams:
    layers = (_layer(8, 4), _layer(4, 4))
    return ops.BlockParams(layers, _layer(16, 8, 1))._replace(**changes)


def _ops() -> list[Row]:
    x4, x8 = torch.ones(1, 4, 6, 6), torch.ones(1, 8, 6, 6)
    square, vector = torch.ones(8, 8), torch.ones(8)

    def conv(wrong: str, error: Any, words: str, x: Any = x4, **changes: Any) -> Row:
        layer = _layer(**changes)
        return Row("conv_bn_relu", wrong, lambda _: ops.conv_bn_relu(x, layer), error, words)

    def block(wrong: str, error: Any, words: str, x: Any = x8, **changes: Any) -> Row:
        params = _block(**changes)
        return Row("osa_block", wrong, lambda _: ops.osa_block(x, params), error, words)

    def ese(wrong: str, error: Any, words: str, *args: Any) -> Row:
        return Row("ese", wrong, lambda _: ops.ese(*args), error, words)

    def pool(wrong: str, error: Any, words: str, *args: Any) -> Row:
        return Row("max_pool", wrong, lambda _: ops.max_pool(*args), error, words)

    def fold(wrong: str, error: Any, words: str, **changes: Any) -> Row:
        args = dict(weight=torch.ones(8, 4, 3, 3), bias=None, bn_weight=vector, bn_bias=vector,
                    running_mean=vector, running_var=vector, eps=1e-5)  # fmt: skip
        call = lambda _: ops.conv_bn_relu(x4, ops.fold(**{**args, **changes}))  # noqa: E731
        return Row("fold", wrong, call, error, words)

    def wanted(wrong: str, names: Any, words: str) -> Row:
        call = lambda s: features(s, image(), names)  # noqa: E731
        return Row("features", wrong, call, ValueError, words)

    found = [
        conv("rank", ValueError, r"\[4, 6, 6\]", x4[0]),
        conv("channels", ValueError, "channels", x8),
        conv("integers", TypeError, "int32", x4.int()),
        conv("a kernel of 5", ValueError, "K = 1 or 3", kernel=5),
        conv("a weight of rank 2", ValueError, "weight", weight=torch.ones(8, 4)),
        conv("a scale of 7", ValueError, r"scale.*\[8\]", scale=torch.ones(7)),
        conv("a scale of rank 2", ValueError, r"scale.*\[8\]", scale=torch.ones(8, 1)),
        conv("a shift of 9", ValueError, r"shift.*\[8\]", shift=torch.ones(9)),
        conv("a scale in fp64", TypeError, "scale.*float64", scale=torch.ones(8).double()),
        conv("a shift in fp16", TypeError, "shift.*float16", shift=torch.ones(8).half()),
        conv("fp16 without fp32 scales", TypeError, "scale",
             x4.half(), scale=torch.ones(8).half()),
        conv("a stride of 3", ValueError, "stride must be 1 or 2, got 3", stride=3),
        conv("a stride of 0", ValueError, "stride must be 1 or 2, got 0", stride=0),
        conv("a negative stride", ValueError, "stride must be 1 or 2, got -1", stride=-1),
        conv("another device", ValueError, "meta", weight=torch.ones(8, 3, 3, 4, device="meta")),
        conv("depthwise of other channels", ValueError, "depthwise",
             kernel=1, depthwise=torch.ones(3, 3, 5)),
        conv("depthwise of rank 4", ValueError, "depthwise",
             kernel=1, depthwise=torch.ones(4, 1, 3, 3)),
        conv("statistics of one value", ValueError, "more than one value",
             x4[..., :1, :1], eps=1e-5),
        block("rank", ValueError, r"\[8, 6, 6\]", x8[0]),
        block("channels", ValueError, "8 channels", x4),
        block("no layers", (ValueError, IndexError), "layer", layers=()),
        block("a layer with stride", ValueError, "stride 1",
              layers=(_layer(8, 4, stride=2), _layer(4, 4))),
        block("layers that do not chain", ValueError, "channels",
              layers=(_layer(8, 4), _layer(5, 4))),
        block("a gate without bias", ValueError, "fc_bias", fc_weight=square),
        block("a gate without weight", ValueError, "fc_weight", fc_bias=vector),
        block("a gate of other channels", ValueError, "fc weight",
              fc_weight=torch.ones(4, 4), fc_bias=torch.ones(4)),
        block("an unknown gate", ValueError, "tanh", fc_weight=square, fc_bias=vector, gate="tanh"),
        block("an identity of other channels", ValueError, "identity",
              identity=True, concat=_layer(16, 6, 1)),
        block("complex", TypeError, "complex64", x8.to(torch.complex64)),
        ese("rank", ValueError, r"\[8, 6, 6\]", x8[0], square, vector),
        ese("no pixels", ValueError, "no pixels", x8[:, :, :0], square, vector),
        ese("fc of 4", ValueError, "fc weight", x8, torch.ones(4, 4), vector),
        ese("fc of rank 4", ValueError, "fc weight", x8, torch.ones(8, 8, 1, 1), vector),
        ese("a bias of 7", ValueError, "fc bias", x8, square, torch.ones(7)),
        ese("a strided fc", ValueError, "contiguous", x8, torch.ones(8, 16)[:, ::2], vector),
        ese("an unknown gate", ValueError, "swish", x8, square, vector, "swish"),
        ese("another identity", ValueError, "identity", x8, square, vector, "sigmoid", x4),
        ese("an identity in fp64", ValueError, "identity.*float64",
            x8, square, vector, "sigmoid", x8.double()),
        ese("bytes", TypeError, "uint8", x8.byte(), square, vector),
        pool("rank", ValueError, r"\[6, 6\]", x8[0, 0]),
        pool("mode", ValueError, "'average'", x8, "average"),
        pool("one pixel", ValueError, "2x2", x8[..., :1, :1]),
        pool("one row", ValueError, "2x2", x8[..., :1, :]),
        pool("truth", TypeError, "bool", x8.bool()),
        fold("a mean of 7", (ValueError, RuntimeError), "7", running_mean=torch.ones(7)),
        fold("a weight of rank 2", (ValueError, RuntimeError), "", weight=torch.ones(8, 4)),
        wanted("no names", (), "out_features"),
        wanted("an unknown name", ("stage9",), "stage9"),
        wanted("another order", ("stage5", "stage4"), "order"),
        wanted("a name twice", ("stage4", "stage4"), "stage4"),
    ]  # fmt: skip
    for name, call in (("conv_bn_relu", lambda x: ops.conv_bn_relu(x, _layer())),
                       ("osa_block", lambda x: ops.osa_block(x, _block())),
                       ("ese", lambda x: ops.ese(x, square, vector)),
                       ("max_pool", ops.max_pool)):  # fmt: skip
        for wrong, value in (("None", None), ("a list", [1.0]), ("a number", 3.0)):
            found.append(Row(name, wrong, lambda _, c=call, v=value: c(v), TypeError,
                             type(value).__name__))  # fmt: skip
    return found


def _freezing() -> list[Row]:
    def frozen(wrong: str, error: Any, words: str, **options: Any) -> Row:
        return Row("freeze", wrong, lambda s: freeze(s.model, **options), error, words)

    return [
        Row("freeze", "None", lambda _: freeze(None), TypeError, "NoneType"),
        Row("freeze", "another module", lambda _: freeze(nn.Conv2d(3, 8, 3)), TypeError, "Conv2d"),
        Row("freeze", "a frozen one", lambda s: freeze(s.frozen), TypeError, "FrozenVoVNet"),
        frozen("int8", TypeError, "int8", dtype=torch.int8),
        frozen("fp8", TypeError, "float8", dtype=torch.float8_e4m3fn),
        frozen("complex features", TypeError, "out_dtype.*complex", out_dtype=torch.complex64),
        frozen("a layout", ValueError, "memory_format", memory_format=torch.preserve_format),
        Row("frozen.to", "fp16", lambda s: s.frozen.half(), TypeError, "freeze the original again"),
        Row("frozen.to", "fp64", lambda s: s.frozen.double(), TypeError, "freeze the original"),
        Row("freeze", "group norms", lambda _: freeze(
            VoVNet(SPEC, norm_cfg=dict(type="GN", num_groups=8))),
            vovnet_fast.BackendError, "GroupNorm"),
    ]  # fmt: skip


def _backends() -> list[Row]:
    def chosen(wrong: str, name: Any, words: str) -> Row:
        return Row("use_backend", wrong, lambda _: vovnet_fast.use_backend(name).__enter__(),
                   ValueError, words)  # fmt: skip

    return [
        chosen("unknown", "tensorrt", "tensorrt.*auto"),
        chosen("empty", "", "auto"),
        chosen("capitals", "CUDA", "CUDA.*cuda"),
        chosen("None", None, "None"),
    ]
