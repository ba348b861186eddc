"""Compiles a few kernels ahead, and has Triton look for them, each in a process of its own.

``python -m tests.compiling.compile_some ahead FOLDER`` fills a cache; ``... launch FOLDER`` runs
Triton's launcher up to the launch. Both print JSON. Neither needs a GPU.
"""

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from vovnet_fast import first_use
from vovnet_fast.compiling import cache, jobs, launchers, side_by_side, workers
from vovnet_fast.first_use.rehearsal import Plan, Setting
from vovnet_fast.tools.compile.needed import Run, plan
from vovnet_fast.tuning import Planning

SETTING = Setting(planning=Planning(measured=False))
WANTED = ("conv_tma_kernel", "fc_gate_kernel", "max_pool_kernel")


def some(setting):
    """One launch of each of these kernels: with descriptors, pointers, views of buffers."""
    found = plan(Run("V-19-slim-dw-eSE", (1, 64, 64), "fp16"), setting)
    by_name = {launch.kernel.fn.__name__: launch for launch in reversed(found.launches)}
    return Plan([by_name[name] for name in WANTED], found.functions)


def ahead(folder):
    triton.knobs.cache.dir = str(folder)
    wanted = jobs.different(some(SETTING).launches, "sm_90")
    lost = wanted[0]._replace(key="ELSEWHERE", name="max_pool_kernels")
    results = list(workers.compile_all([lost, *wanted], 2))
    side_by_side.FEW = 0

    def asked():
        return first_use.ahead(("some",), SETTING, some, None)

    found = [asked(), asked()]
    contents = cache.pack(folder, folder.with_suffix(".tar.xz"))
    note = next(folder.glob(f"{cache.MARKER}*.json"))
    (folder / wanted[1].key / f"__grp__{wanted[1].name}.json").unlink()
    return {
        "keys": [job.key for job in wanted],
        "problems": {r.name: r.problem for r in results if r.problem},
        "modules": sum(not r.key for r in results if not r.problem),
        "asked": found,
        "note": sorted(json.loads(note.read_text())),
        "holds without one": first_use.Note(("some",), SETTING).holds(),
        "packed": sorted(contents.kernels),
        "packed modules": contents.modules,
    }


class Pretended:
    """A driver of a GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launch(folder):
    contents = cache.unpack(folder.with_suffix(".tar.xz"), folder, "sm_90")
    triton.knobs.cache.dir = str(folder)
    triton.runtime.driver.set_active(Pretended())
    before = {str(path) for path in folder.rglob("*")}
    for found in some(SETTING).launches:
        options = dict(num_warps=found.num_warps, num_stages=found.num_stages)
        compiled = found.kernel.warmup(**found.args, **found.constants, **options, grid=found.grid)
        module = launchers.of(compiled)
        if module is not None:
            launchers.build(module)
    launchers.build(launchers.utilities())
    return {
        "new": sorted({str(path) for path in folder.rglob("*")} - before),
        "modules": contents.modules,
        "noted": first_use.ahead(("some",), SETTING, some, None),
    }


if __name__ == "__main__":
    print(json.dumps({"ahead": ahead, "launch": launch}[sys.argv[1]](Path(sys.argv[2]))))
