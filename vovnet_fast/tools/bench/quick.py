"""What one network costs here, in about a minute: this library against plain PyTorch.

The peers that take minutes to build (torch.compile), or another library, are in the suites of
``benchmarks/``. The rows are as those of the suites, and ``vovnet-fast bench report`` reads them.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ... import _provenance as provenance
from ... import backends, specs
from ..._files import replacing
from ...compat import zip
from ...deploy.freeze import freeze
from ...network.model import VoVNet
from ...ops.features import needs
from ..plan import DTYPES, check_input
from .rows import EAGER
from .stopwatch import Stopwatch, interleaved, ratio_interval, spread
from .training import Shape, TrainingStep, image

SPEC = "V-39-eSE"
SHAPES: dict[str, Shape] = {"cuda": (1, 800, 1344), "cpu": (1, 224, 224)}
"""Of the images, by the kind of device."""

ROUNDS = 50
FEWEST = 6
SECONDS = 20.0
"""For the rounds of a pass, which are at least :data:`FEWEST` and at most :data:`ROUNDS`. With
fewer than six no interval has 95 %."""

MAX_DISTANCE = {"inference": 0.1, "training": 0.3}
"""From eager, relative: further away, something else was computed. bf16 alone makes a
hundredth of the features, and a tenth of the gradients, as roundings switch ReLUs."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        spec: an architecture's name.
        shape: N, H, W of the images.
        dtype: of the activations, a key of :data:`vovnet_fast.tools.plan.DTYPES`.
        device: where.
        backend: this library's; ``auto`` takes what a user gets.
        train: a training step too.
        seconds: for the rounds of inference, and of training.
    """

    spec: str
    shape: Shape
    dtype: str
    device: torch.device
    backend: str = "auto"
    train: bool = True
    seconds: float = SECONDS

    @classmethod
    def here(
        cls,
        spec: str | None = None,
        shape: Shape | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> Options:
        """With defaults for the device that is there.

        Raises:
            UnknownSpecError, ValueError: there is no such architecture, size or dtype.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = shape or SHAPES[device.type]
        dtype = dtype or ("bf16" if device.type == "cuda" else "fp32")
        check_input(shape, dtype)
        return cls(specs.get(spec or SPEC).name, shape, dtype, device, **options)

    @property
    def images(self) -> str:
        """``NxCxHxW``."""
        return f"{self.shape[0]}x3x{self.shape[1]}x{self.shape[2]}"


@dataclass
class Found:
    """The outcome.

    Attributes:
        options: what was measured.
        provenance: machine and sources.
        rows: one for each provider and pass, with the fields of :class:`.rows.Row`.
    """

    options: Options
    provenance: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As pytest-benchmark writes its files."""
        benchmarks = [
            {
                "name": f"{row['kind']}[{row['spec']}-{row['shape']}-{row['provider']}]",
                "group": f"{row['kind']} {row['spec']} {row['shape']}",
                "stats": _stats(row["times"]),
                "extra_info": {name: row[name] for name in row if name != "times"},
            }
            for row in self.rows
        ]
        content = {
            "machine_info": {"provenance": self.provenance},
            "datetime": self.provenance["date"],
            "benchmarks": benchmarks,
        }
        with replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _Provider(NamedTuple):
    """Who takes part: how to make its call, under which backend, with which settings."""

    name: str
    make: Callable[[], Callable[[], Any]]
    backend: str
    settings: str


def measure(
    options: Options, progress: Callable[[str, float], None] = lambda what, done: None
) -> Found:
    """Measure a network in inference and in training.

    Args:
        options: what.
        progress: is told what is being done, and which part of everything is done about.

    Raises:
        BackendError: the backend cannot run, or computes something else than eager.
        ValueError: the images are too small for the network.
    """
    device = options.device
    watch, clocks = Stopwatch(device), provenance.Clocks(device)
    found = Found(options, provenance.collect(device))
    with _best_cudnn():
        passes = [("inference", _inference(options))]
        passes += [("training", _training(options))] if options.train else []
        for number, (kind, providers) in enumerate(passes):

            def tell(what: str, done: float, number: int = number) -> None:
                progress(what, (number + done) / len(passes))

            with torch.inference_mode(kind == "inference"):
                found.rows += _measure(options, kind, providers, watch, tell)
            clocks.see()
    found.provenance["clocks"] = clocks.summary()
    return found


# --------------------------------------------------------------------------------------
# Who takes part
# --------------------------------------------------------------------------------------


def _network(options: Options, *, channels_last: bool = True) -> VoVNet:
    """The same weights each time, in fp32."""
    torch.manual_seed(0)
    with torch.device(options.device), torch.inference_mode(False):
        model: Any = VoVNet(options.spec)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
    return cast(VoVNet, model)


def _inference(options: Options) -> list[_Provider]:
    """Eager comes first: the others are compared with it."""
    dtype = DTYPES[options.dtype]

    def eager(memory_format: torch.memory_format) -> Callable[[], Any]:
        nhwc = memory_format == torch.channels_last
        model = _network(options, channels_last=nhwc).to(dtype).eval()
        images = image(options.shape, dtype, options.device, memory_format)
        return lambda: model(images)

    def frozen(graph: bool = False) -> Callable[[], Any]:
        model = freeze(_network(options).eval(), dtype, graph=graph)
        images = image(options.shape, dtype, options.device)
        return lambda: model(images)

    weights = f"weights in {options.dtype}"
    ours = _ours(options, backward=False)
    found = [
        _Provider(
            EAGER, lambda: eager(torch.channels_last), "reference", f"channels_last, {weights}"
        ),
        _Provider(
            "eager NCHW", lambda: eager(torch.contiguous_format), "reference", f"NCHW, {weights}"
        ),
        _Provider(
            "folded", frozen, "reference",
            f"plain PyTorch, batch norms folded, channels_last, {weights}",
        ),
    ]  # fmt: skip
    if ours != "reference":
        found.append(_Provider(f"vovnet_fast ({ours})", frozen, ours, f"freeze, {weights}"))
        if options.device.type == "cuda":
            found.append(
                _Provider(
                    f"vovnet_fast ({ours}), graph", lambda: frozen(graph=True), ours,
                    f"freeze in a CUDA graph, {weights}",
                )
            )  # fmt: skip
    return found


def _training(options: Options) -> list[_Provider]:
    mixed = "fp32" if options.dtype == "fp32" else f"autocast to {options.dtype} over fp32"

    def step(channels_last: bool = True) -> Callable[[], Any]:
        model = _network(options, channels_last=channels_last).train()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return TrainingStep(model, options.shape, options.device, DTYPES[options.dtype], layout)

    settings = f"{mixed}, batch norms with fixed statistics"
    ours = _ours(options, backward=True)
    found = [
        _Provider(EAGER, step, "reference", f"channels_last, {settings}"),
        _Provider("eager NCHW", lambda: step(False), "reference", f"NCHW, {settings}"),
    ]
    if ours != "reference":
        found.append(_Provider(f"vovnet_fast ({ours})", step, ours, f"channels_last, {settings}"))
    return found


def _ours(options: Options, *, backward: bool) -> str:
    """Which backend the user gets; checks it where that has not been done yet."""
    needed = needs(specs.get(options.spec), backward=backward)
    with backends.use_backend(options.backend):
        return backends.select(options.device, DTYPES[options.dtype], needed)


# --------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------


def _measure(
    options: Options,
    kind: str,
    providers: Sequence[_Provider],
    watch: Stopwatch,
    progress: Callable[[str, float], None],
) -> list[dict[str, Any]]:
    """Build everybody, compare what they compute, and let them run in turn."""
    rows, works, first = [], {}, None
    for provider in providers:
        progress(f"{kind}: preparing {provider.name}", 0.0)
        with _backend(provider), _memory(options.device) as memory:
            work = provider.make()
            result = _result(work)  # Compiles, chooses engines, captures.
            memory.settled()
            work()
        works[provider.name] = _under(provider, work)
        first = result if first is None else first
        distance = _distance(result, first)
        if not distance <= MAX_DISTANCE[kind]:
            raise backends.BackendError(
                f"{provider.name} computes something else than eager: in {kind}, its results are "
                f"{distance:.2g} away, relative, and {MAX_DISTANCE[kind]:g} is allowed"
            )
        rows.append(_row(options, kind, provider, distance, memory.peak_mib))
    begin = time.perf_counter()

    def each(name: str) -> None:
        done = (time.perf_counter() - begin) / max(options.seconds, 1e-3)
        progress(f"{kind}: {name}", min(done, 1.0))

    times = interleaved(
        works, ROUNDS, watch=watch, seconds=options.seconds, fewest=FEWEST, each=each
    )
    for row in rows:
        taken = times[row["provider"]]
        row |= dict(times=taken, **ratio_interval(times[EAGER], taken).fields(), **spread(taken))
    return rows


def _row(
    options: Options, kind: str, provider: _Provider, distance: float, peak: float | None
) -> dict[str, Any]:
    row = dict(
        kind=kind, provider=provider.name, spec=options.spec, shape=options.images,
        dtype=options.dtype, settings=provider.settings, distance=distance,
        backend=None if provider.backend == "reference" else provider.backend,
    )  # fmt: skip
    row["pass"] = "step" if kind == "training" else "forward"
    return row if peak is None else row | {"peak_mib": peak}


def _result(work: Callable[[], Any]) -> list[Tensor]:
    """What a call computes, on the CPU: the features, or the gradients of all parameters."""
    found = work()
    if isinstance(work, TrainingStep):
        found = [parameter.grad for parameter in work.parameters]
    return [cast(Tensor, tensor).float().cpu() for tensor in found]


def _distance(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of all tensors together, relative, in norms."""
    pairs = list(zip(result, expected, strict=True))
    apart = sum((a - b).double().square().sum().item() for a, b in pairs)
    return math.sqrt(apart / sum(b.double().square().sum().item() for _, b in pairs))


def _backend(provider: _Provider) -> contextlib.AbstractContextManager[None]:
    return backends.use_backend(provider.backend)


def _under(provider: _Provider, work: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with _backend(provider):
            work()

    return run


class _Memory:
    """What a provider takes from the driver, its weights and results included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.peak_mib: float | None = None
        if device.type == "cuda":
            self.settled()
            self._before = torch.cuda.memory_reserved(device)

    def settled(self) -> None:
        """What has been needed up to now was preparation, and does not count."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> None:
        """Read the peak: reserved, so that the pools of CUDA graphs count."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_reserved(self._device)
            self.peak_mib = (peak - self._before) / 2**20


@contextlib.contextmanager
def _memory(device: torch.device) -> Iterator[_Memory]:
    memory = _Memory(device)
    yield memory
    memory.end()


@contextlib.contextmanager
def _best_cudnn() -> Iterator[None]:
    """cuDNN may try its algorithms, for everybody: nobody is compared with a bad one."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _stats(times: Sequence[float]) -> dict[str, float]:
    return {
        "min": min(times),
        "max": max(times),
        "mean": statistics.fmean(times),
        "stddev": statistics.stdev(times) if len(times) > 1 else 0.0,
        "median": statistics.median(times),
        "rounds": len(times),
    }
