"""The steps of ``benchmarks/gpu.py``: what proves most in a second comes first.

Each is also rehearsed: on a CPU, in the same order, with next to nothing to do, or with the reason
why there is nothing that it could do. Of the two numbers after its words, the first is what a step
is expected to take on a data-center GPU whose kernels are compiled, the second when it is stopped.
"""

from __future__ import annotations

from .folder import TUNING
from .maker import ONLY_ON_GPU, Maker
from .steps import Step

V99, V39 = "V-99-eSE-6x3x640x1600", "V-39-eSE-1x3x800x1344"
HEADLINE = f"({V99} or V-99-eSE-8x3x800x1344 or {V39})"
""":data:`benchmarks.networks.HEADLINE`, as pytest's ``-k`` selects it."""

EIGHT_BITS = "int8 or fp8"
"""Networks in eight bits, by name."""

MAPS = "400x672 or 200x336 or 100x168 or 50x84 or 25x42"
"""Those of 800x1344."""

_INFERENCE, _TRAINING = "benchmarks/test_inference.py", "benchmarks/test_training.py"
_ALL = ("-m", "slow or not slow")
_REHEARSED_ALREADY = "a step of its kind is rehearsed above"


def plan(make: Maker) -> list[Step]:
    """All steps, in order."""
    before = [make.extension()] if make.carried.fits else []
    after = [] if make.carried.fits else [make.extension()]  # It is built, which takes longer.
    return [
        make.cache(), *before, *_proofs(make), *after, *_extension(make), *_headline(make),
        *_engines(make), *_rest(make), make.report(),
    ]  # fmt: skip


def _proofs(make: Maker) -> list[Step]:
    """Does it work at all, and is everything right?"""
    look = ["-m", "benchmarks.first_look"]
    return [
        make.step(
            "first look", "ceilings; kernels and networks of each backend against fp64", 45, 90,
            look, rehearsed=[*look, "--small", "--seconds", "3600"], kind="look",
        ),
        make.tests(
            "numerics", "every op forward and backward, sizes by chance, gradients of networks",
            120, 200, "tests/kernels",
            rehearsed=["tests/kernels/test_max_pool.py", "-k", "empty"],
        ),
    ]  # fmt: skip


def _extension(make: Maker) -> list[Step]:
    """The CUDA C++ kernels; the Hopper convolution by itself, as it may never end."""
    return [
        make.tests(
            "cuda", "CUDA C++ kernels, graphs, streams, frozen networks", 60, 100,
            "tests", "--ignore=tests/kernels", "--ignore=tests/csrc/test_conv_sm90.py",
            "--ignore=tests/csrc/test_conv_sm90_e4m3.py",
            "--continue-on-collection-errors", "-m", "gpu",
            rehearsed=ONLY_ON_GPU,
        ),
    ]  # fmt: skip


def _headline(make: Maker) -> list[Step]:
    """The table that everybody asks for, with the choices that need no measurement."""
    small = "V-19-slim-dw-eSE"
    return [
        make.benchmark(
            "headline inference", "inference of V-99 and V-39 against all peers", 130, 200,
            _INFERENCE, "-k", f"{HEADLINE} and not ({EIGHT_BITS})",
            rehearsed=[_INFERENCE, "-k", f"{small}-1x3x128x128 and (eager or folded)"],
        ),
        make.benchmark(
            "headline training", "training steps of V-99 and V-39 against all peers", 130, 200,
            _TRAINING, "-k", HEADLINE,
            rehearsed=[_TRAINING, "-k", f"{small} and (checkpoint or folding) and not fused"],
        ),
        make.benchmark(
            "headline compiled", "V-39 under torch.compile, max-autotune, and TensorRT", 120, 200,
            _INFERENCE, _TRAINING, "-k", f"{V39} and (max-autotune or tensorrt)", *_ALL,
            rehearsed="compiling for a CPU takes minutes and says nothing",
        ),
        make.benchmark(
            "headline eight bits", "V-39 and V-99 in int8 and fp8, beside ours in bf16", 100, 200,
            _INFERENCE, "-k", f"({V39} or {V99}) and ({EIGHT_BITS} or fused-graph-triton)",
            rehearsed=[_INFERENCE, "-k", f"{small}-1x3x128x128 and fused-int8-cpu"],
        ),
    ]  # fmt: skip


def _engines(make: Maker) -> list[Step]:
    """Convolutions one by one, memory errors and races, and what tuning makes of it."""
    layers = ["benchmarks/test_ceilings.py", "benchmarks/test_conv.py"]
    tune = ["-m", "benchmarks.tune", "--out", str(make.folder.out / TUNING)]
    return [
        make.tests(
            "hopper", "the hand-written convolution for Hopper, in e4m3 too", 40, 90,
            "tests/csrc/test_conv_sm90.py", "tests/csrc/test_conv_sm90_e4m3.py", "-m", "gpu",
            rehearsed=f"{ONLY_ON_GPU} of compute capability 9.0",
        ),
        make.benchmark(
            "layers", "every layer on an engine of each form, side by side", 80, 130, *layers,
            "--engines=forms",
            "-k", f"ceiling or ((triton or cuda) and not gradient and ({MAPS}))",
            rehearsed=[
                "benchmarks/test_conv.py", "--engines=forms", "-k",
                "not gradient and ((40x40 and eager) or (8x8 and triton))",
            ],
        ),
        make.benchmark(
            "layer gradients", "the same for gradients of inputs and of weights", 100, 160, *layers,
            "--engines=forms", "-k", f"ceiling or ((triton or cuda) and gradient and ({MAPS}))",
            rehearsed="the layers are rehearsed above, forward",
        ),
        make.benchmark(
            "hopper layers", "all candidates of the convolution for Hopper, forward and of inputs",
            120, 200, *layers, "--engines=conv-sm90",
            "-k", f"cuda and not weight and ({MAPS})",
            rehearsed="the layers are rehearsed above, with other engines",
            variables={"VOVNET_FAST_CONV_SM90": "1"},
        ),
        make.benchmark(
            "eight-bit layers", "layers in fp8 on Triton's choice and on that for Hopper", 60, 120,
            "benchmarks/test_ceilings.py", "benchmarks/test_conv_eight_bits.py",
            "--engines=conv-sm90", "-k", f"ceiling or (fp8 and ({MAPS}))",
            rehearsed=["benchmarks/test_conv_eight_bits.py", "--engines=conv-sm90", "-k", "fp8"],
            variables={"VOVNET_FAST_CONV_SM90": "1"},
        ),
        *(make.sanitizer(tool) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
        make.step(
            "tuning", "the fastest engines for the layers of the headline", 90, 150, tune,
            rehearsed=tune, kind="tuning", variables={"VOVNET_FAST_TUNE": "1"},
        ),
        make.benchmark(
            "headline tuned", "the headline's networks on the engines that were measured", 60, 100,
            _INFERENCE, _TRAINING, "-k", f"{HEADLINE} and (fused-triton or fused-graph-triton)",
            rehearsed="nothing is tuned on a CPU", variables={"VOVNET_FAST_TUNE": "1"},
        ),
    ]  # fmt: skip


def _rest(make: Maker) -> list[Step]:
    """Everything else."""
    blocks = ["ceilings", "blocks", "ops"]
    every = make.folder.rest / "tuning_all.json"
    return [
        make.benchmark(
            "compiled V-99", "V-99 under torch.compile, max-autotune, and TensorRT", 180, 280,
            _INFERENCE, _TRAINING, "-k", f"{V99} and (max-autotune or tensorrt)", *_ALL,
            rehearsed="compiling for a CPU takes minutes and says nothing",
        ),
        make.tests(
            "architectures", "gradients of all architectures", 90, 150,
            "tests/kernels/test_device.py", "-m", "slow", rehearsed=ONLY_ON_GPU,
        ),
        make.benchmark(
            "blocks", "OSA blocks and other operations", 90, 150,
            *(f"benchmarks/test_{name}.py" for name in blocks),
            "-k", f"ceiling or ((eager or triton or cuda) and ({MAPS}))",
            rehearsed=_REHEARSED_ALREADY,
        ),
        make.step(
            "all engines", "every engine for the layers of the headline, for judging predictions",
            240, 400, ["-m", "benchmarks.tune", "--out", str(every)], kind="tuning",
            rehearsed="nothing is measured on a CPU",
            variables={
                "VOVNET_FAST_TUNE": "all", "VOVNET_FAST_CACHE": str(make.folder.scratch / "all")
            },
        ),
        make.benchmark(
            "other inference", "inference of other networks and sizes", 120, 200,
            _INFERENCE, "-k", f"(V-39-eSE or V-99-eSE or V-19-slim-dw-eSE) and not {HEADLINE}",
            rehearsed=_REHEARSED_ALREADY,
        ),
        make.benchmark(
            "other training", "training steps of other networks and sizes", 120, 200,
            _TRAINING, "-k", f"(V-39-eSE or V-99-eSE) and not {HEADLINE}",
            rehearsed=_REHEARSED_ALREADY,
        ),
        make.benchmark(
            "detectors", "detectors, images a second and training steps", 90, 150,
            "benchmarks/test_detector.py", rehearsed=_REHEARSED_ALREADY,
        ),
        make.trainings(),
    ]  # fmt: skip
