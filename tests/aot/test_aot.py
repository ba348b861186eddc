"""Every Triton kernel in every shipped configuration compiles, and to what it should.

Compilation needs no GPU, but a process in which Triton does not interpret: each
architecture gets one, and they run at the same time. What a kernel compiled to is
committed, under a key of its source, its specialisation and the compiler: only what
is new is compiled, and a few of the others, to see that what is written is true.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the Triton backend is optional")

import triton

import vovnet_fast
from vovnet_fast.aot.__main__ import main

ROOT = Path(__file__).parents[2]
SMEM_OF_ADA = 99 << 10  # Bytes a program may use on sm_86 and sm_89, which run what sm_80 does.


def start(*command):
    """Start Python with this package on its path and Triton's compiler in charge."""
    root = str(Path(vovnet_fast.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    env.pop("TRITON_INTERPRET", None)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], env=env, stdout=pipe, stderr=pipe, text=True
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err[-4000:]
    return [json.loads(line) for line in out.splitlines()]


def known(arch):
    """The file of rows that are committed."""
    return ROOT / "docs" / f"kernels_{arch}.jsonl"


@pytest.fixture(scope="module")
def tables():
    """Rows by architecture, compiled side by side where they are not known."""
    running = {
        arch: start("-m", "vovnet_fast.aot", "--json", "--arch", arch, "--known", known(arch))
        for arch in ("sm_90", "sm_80", "sm_89")
    }
    return {arch: finish(process) for arch, process in running.items()}


def named(rows, wrong):
    """Readable list of the rows for which ``wrong`` holds."""
    return [f"{r['kernel']} {r['layer']} {r['config']}: {r}" for r in rows if wrong(r)]


SPILLED_BY_3_6 = {
    ("sm_80", "conv statistics", "96>96 3x3/1 float32", "pointer-64x32+16-k16-w4-s2"),
    ("sm_100", "conv weight gradient", "128>128 3x3/1 float16", "pointer-1x64-128-w4-p32-s4"),
}
"""A register or a few, where Triton 3.7 needs none."""


def spills(row):
    kernel = (row["arch"], row["kernel"], row["layer"], row["config"])
    if triton.__version__.startswith("3.6.") and kernel in SPILLED_BY_3_6:
        return row["spilled"] > 64
    return row["spilled"] or {"STL", "LDL"} & set(row["instructions"])


EIGHT_BITS = "conv eight bits"


def in_eight_bits(rows, form, *, wide=False):
    """The convolutions in a format, or those of a wide stem, which multiply other numbers."""
    rows = [r for r in rows if r["kernel"] == EIGHT_BITS and r["layer"].endswith("wide") == wide]
    return [r for r in rows if f" {form}" in r["layer"]]


def in_floats(rows):
    return [r for r in rows if r["kernel"] != EIGHT_BITS]


def check_eight_bits(rows, form, multiply):
    """Convolutions multiply bytes, and those by bulk copies without a detour through registers."""
    found = in_eight_bits(rows, form)
    assert len(found) > 10
    assert not named(found, lambda r: not r["instructions"].get(multiply))
    tma = [r for r in found if r["config"].startswith("tma")]
    for name in ("UTMALDG", "UTMASTG"):
        assert not named(tma, lambda r, name=name: not r["instructions"].get(name))
    assert not named(tma, lambda r: {f"{multiply}(R)", "LDSM"} & set(r["instructions"]))
    return {r["config"].split("-")[0] for r in found}


def check_limits(rows):
    assert not named(rows, spills)
    assert not named(rows, lambda r: r["registers"] > 255 or r["ctas"] < 1)
    # The elementwise kernels live from having many loads in flight.
    elementwise = [r for r in rows if not r["kernel"].startswith("conv")]
    assert not named(elementwise, lambda r: r["ctas"] * r["warps"] < 16)


def check_bulk_copies(rows, multiply):
    tma = [r for r in rows if r["config"].startswith("tma")]
    assert tma
    for name in (multiply, "UTMALDG"):
        assert not named(tma, lambda r, name=name: not r["instructions"].get(name))
    # Partial sums of weight gradients are stored from where they are.
    tiles = [r for r in tma if r["kernel"] != "conv weight gradient"]
    assert not named(tiles, lambda r: not r["instructions"].get("UTMASTG"))
    # Nothing reaches HGMMA through registers. (UTCHMMA has no such form.)
    hopper = [r for r in tma if r["arch"] == "sm_90"]
    assert not named(hopper, lambda r: {"HGMMA(R)", "HMMA"} & set(r["instructions"]))
    # What an input gradient is added to and masked by comes by bulk copies and LDSM; the
    # programs that sum the gradient end with a transposition.
    others = [r for r in hopper if not r["kernel"].endswith("gradient")]
    assert not named(others, lambda r: "LDSM" in r["instructions"])


def is_pipelined(row):
    """Whether a pointer loop has more than one step, and loads of at least four bytes."""
    c_in, taps = re.match(r"(\d+)>\d+ (\d)x", row["layer"]).groups()
    block_k = re.search(r"-k(\d+)-", row["config"])[1]
    return c_in != "3" and int(c_in) * int(taps) ** 2 > int(block_k)


def check_async_copies(rows):
    products = [r for r in rows if r["kernel"] != "conv weight gradient"]
    pipelined = [r for r in products if "pointer" in r["config"] and is_pipelined(r)]
    assert pipelined
    assert not named(pipelined, lambda r: not r["instructions"].get("LDGSTS"))


def check_weight_gradients(rows, multiply):
    """Their loops hold all stages of both operands in shared memory but the one in use."""
    gradients = [r for r in rows if r["kernel"] == "conv weight gradient"]
    halves = [r for r in gradients if "float16" in r["layer"] and r["layer"][:2] != "3>"]
    assert halves

    def lost_its_pipeline(row):
        tile = re.search(r"-(\d+)x(\d+)-([\d+]+)-", row["config"])
        groups, columns, blocks = tile.groups()
        channels = int(groups) * int(columns) + sum(map(int, blocks.split("+")))
        pixels = 128  # Of the tma form, whose stages are the fewer the more pixels they have.
        if "pointer" in row["config"]:
            each, stages = re.search(r"-p(\d+)-s(\d+)", row["config"]).groups()
            pixels = (int(stages) - 1) * int(each)
        return row["shared"] < pixels * channels * 2

    assert not named(halves, lost_its_pipeline)
    assert not named(halves, lambda r: not r["instructions"].get(multiply))
    assert not named(halves, lambda r: "HGMMA(R)" in r["instructions"])
    pointer = [r for r in gradients if "pointer" in r["config"]]
    assert not named(pointer, lambda r: not r["instructions"].get("LDGSTS"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_what_is_committed_is_what_is_shipped(tables, arch):
    written = [json.loads(line) for line in known(arch).read_text().splitlines()]
    if tables[arch][0]["key"] not in {row["key"] for row in written}:
        pytest.skip(f"{known(arch).name} is not of Triton {triton.__version__}")
    update = f"python -m vovnet_fast.aot --arch {arch} --json > new; mv new {known(arch)}"
    assert written == tables[arch], update


SOME = """
import dataclasses
import json
import sys
from vovnet_fast import aot

arch, every = sys.argv[1], int(sys.argv[2])
essential = [job for job in aot.jobs(arch) if job.essential]
for job in essential[every // 2 :: every]:
    print(json.dumps(dataclasses.asdict(aot.compile_job(job, arch))))
"""


def test_rows_that_are_read_are_the_compilers(tables):
    """A few of every kind. The guard compiles those in which networks spend their time."""
    running = {arch: start("-c", SOME, arch, "20") for arch in tables}
    for arch, process in running.items():
        found = finish(process)
        assert len(found) > (1 if arch == "sm_89" else 5)
        assert not [row for row in found if row not in tables[arch]]


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_limits(tables, arch):
    check_limits(tables[arch])


def test_eight_bits(tables):
    assert check_eight_bits(tables["sm_80"], "int8", "IMMA") == {"pointer"}
    assert check_eight_bits(tables["sm_89"], "fp8", "QMMA") == {"pointer"}
    assert check_eight_bits(tables["sm_90"], "int8", "IGMMA") == {"pointer", "tma"}
    assert check_eight_bits(tables["sm_90"], "fp8", "QGMMA") == {"pointer", "tma"}
    assert {r["layer"].rpartition(" ")[2] for r in tables["sm_89"]} <= {
        "fp8",
        "feature",
        "both",
        "wide",
    }
    check_async_copies(tables["sm_89"])
    assert not named(tables["sm_89"], lambda r: r["shared"] > SMEM_OF_ADA)
    (wide,) = in_eight_bits(tables["sm_80"], "int8", wide=True)
    assert wide["instructions"]["HMMA"], "int16 is multiplied in fp16"


def test_sm_80(tables):
    rows = tables["sm_80"]
    convs = [r for r in rows if r["kernel"].startswith("conv")]
    assert {r["config"].split("-")[0] for r in convs} == {"pointer"}
    check_async_copies(rows)
    check_weight_gradients(rows, "HMMA")
    assert not named(rows, lambda r: r["shared"] > SMEM_OF_ADA)
    tensor_cores = [r for r in in_floats(convs) if "float32" not in r["layer"]]
    assert not named(tensor_cores, lambda r: not r["instructions"].get("HMMA"))


def test_sm_90(tables):
    check_bulk_copies(in_floats(tables["sm_90"]), "HGMMA")
    check_async_copies(tables["sm_90"])
    check_weight_gradients(tables["sm_90"], "HGMMA")


TABLES = """
import json
from vovnet_fast.aot import resources
from vovnet_fast.kernels.resources import Resources, tables

for capability, table in tables().items():
    arch, found = f"sm_{capability[0]}{capability[1]}", []
    for (row, config), job in resources.jobs(arch):
        registers, shared, spilled = table["programs"][row].pop(config)
        resident = Resources(job.launch.num_warps, registers, shared).resident(capability)
        found.append([job.kernel, job.layer, config, [resident, spilled]])
    print(json.dumps([arch, table["triton"], sum(map(len, table["programs"].values())), found]))
"""


def test_resources_that_choices_are_made_from_are_the_compilers(tables):
    """No configuration too many or too few, and programs a processor as compiled here.

    After a change to the kernels ``python -m vovnet_fast.aot --resources`` writes them anew.
    """
    import triton

    written = finish(start("-c", TABLES))
    assert [arch for arch, *_ in written] == ["sm_80", "sm_90"]
    for arch, version, too_many, found in written:
        assert not too_many
        if version != triton.__version__:
            pytest.skip(f"the tables are those of Triton {version}")
        compiled = {
            (r["kernel"], r["layer"], r["config"]): [r["ctas"], r["spilled"]] for r in tables[arch]
        }
        known = [(tuple(name), fits) for *name, fits in found if tuple(name) in compiled]
        assert len(known) > 60
        assert not [(n, fits, compiled[n]) for n, fits in known if fits != compiled[n]]


SHIPPED = """
import json
from vovnet_fast import specs
from vovnet_fast.kernels.conv_config import candidates

def layers(spec):
    stem = (3, *spec.stem_channels)
    for c_in, c_out, stride in zip(stem, stem[1:], spec.stem_strides):
        if spec.depthwise and c_in != 3:
            yield c_in, c_out, 1, 1
        else:
            yield c_in, c_out, 3, stride
    for block in spec.blocks():
        kernel = 1 if block.depthwise else 3
        mid = block.mid_channels
        yield block.in_channels, mid, 1 if block.reduction else kernel, 1
        yield mid, mid, kernel, 1
        yield block.concat_channels, block.out_channels, 1, 1

for c_in, c_out, kernel, stride in {layer for s in specs.SPECS.values() for layer in layers(s)}:
    for capability, arch in (((8, 0), "sm_80"), ((9, 0), "sm_90")):
        tma = stride == 1 and c_in > 3
        for config in candidates(capability, c_in, c_out, kernel=kernel, tma=tma):
            print(json.dumps([arch, config.name, f"{c_in}>{c_out} {kernel}x{kernel}/{stride}"]))
"""


def test_tables_hold_every_configuration_of_every_published_network(tables):
    compiled = {(arch, r["config"]) for arch, rows in tables.items() for r in rows}
    shipped = finish(start("-c", SHIPPED))
    assert len(shipped) > 100
    assert not [row for row in shipped if (row[0], row[1]) not in compiled]


OFFSETS = """
import json
import torch
from vovnet_fast import aot
from vovnet_fast.kernels import (
    accumulate, batch_norm_backward, conv, conv_weight_grad, conv_weight_grad_finish, depthwise,
    ese, ese_backward, max_pool,
)
from vovnet_fast.kernels.conv_config import ConvConfig
from vovnet_fast.kernels.conv_weight_grad_config import WeightGradConfig

def view(*strides):
    return torch.empty(1, dtype=torch.float16, device="meta").as_strided((2, 5, 7, 16), strides)

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

config = ConvConfig("pointer", 1, 64, (16,), 16, 4, 2)
columns = WeightGradConfig("pointer", 64, 1, (16,), 32, 4, 2)
for wide, x in ((False, view(2**31, 112, 16, 1)), (True, view(2**34, 2**30, 16, 1))):
    weight, vector = meta(16, 3, 3, 16, dtype=torch.float16), meta(16)
    launches = dict(
        conv=conv.plan(x, weight, vector, vector, x, config=config),
        conv_input_grad=conv.plan_input_grad(
            x[:, ::2, ::2], weight, x, stride=2, add=x, mask=x, config=config
        ),
        accumulate=accumulate.plan(x, x, x, x),
        conv_weight_grad=conv_weight_grad.plan(x, x, 3, config=columns)[0],
        channel_sums=conv_weight_grad_finish.plan_channel_sums(x)[0],
        depthwise_input_grad=depthwise.plan_input_grad(
            x, meta(3, 3, 16, dtype=torch.float16), x, add=x, mask=x
        ),
        depthwise_weight_grad=depthwise.plan_weight_grad(x, x, meta(3, 3, 16))[0],
        depthwise=depthwise.plan(x, meta(3, 3, 16, dtype=torch.float16), x),
        apply=ese.plan_apply(x, meta(2, 16), x, x),
        max_pool=max_pool.plan(x, x[:, :2, :3], "ceil"),
        gate_sums=ese_backward.plan_gate_sums(x, x, meta(2, 16))[0],
        apply_backward=ese_backward.plan_apply_backward(x, meta(2, 16), meta(2, 16), x, x),
        max_pool_backward=max_pool.plan_backward(
            x[:, :2, :3], meta(2, 2, 3, 16, dtype=torch.uint8), x, "ceil"
        ),
        backward_sums=batch_norm_backward.plan_backward_sums(x, x, meta(6, 16), meta(2, 16))[0],
        input_grad=batch_norm_backward.plan_input_grad(x, x, meta(6, 16), meta(2, 16), None, x),
    )
    for name, launch in launches.items():
        ir = aot.compile_launch(launch, "sm_90").asm["ttir"]
        print(json.dumps([name, wide, ir]))
"""


def test_offsets_are_wide_enough():
    """Between images always 64 bits; inside one, as the launcher found necessary."""
    rows = finish(start("-c", OFFSETS))
    assert len(rows) == 30
    for name, wide, ir in rows:
        products = [line for line in ir.splitlines() if "arith.muli" in line]
        types = [line.split(" : ")[1].split(" loc")[0].strip() for line in products]
        assert "i64" in types, f"{name}: no 64-bit batch offset among {types}"
        tensor_is_wide = any("tensor" in kind and "i64" in kind for kind in types)
        assert tensor_is_wide == wide, f"{name}: {types}"


BLACKWELL = """
import dataclasses
import json
import sys
from pathlib import Path
from vovnet_fast import aot

known = aot.read(Path(sys.argv[1]))
for job in aot.jobs("sm_100"):
    if job.layer in ("128>128 3x3/1 float16", "768>256 1x1/1 float16") and job.essential:
        print(json.dumps(dataclasses.asdict(aot.look_up(job, "sm_100", known))))
"""


def test_sm_100():
    """Two layers. A file of what this prints is committed, as for the others."""
    rows = finish(start("-c", BLACKWELL, known("sm_100")))
    check_limits(rows)
    check_bulk_copies(rows, "UTCHMMA")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_layer_in_every_configuration(arch):
    rows = finish(start("-m", "vovnet_fast.aot", "--json", "--all", "--arch", arch))
    check_limits(rows)
    if arch != "sm_80":
        check_bulk_copies(in_floats(rows), "HGMMA" if arch == "sm_90" else "UTCHMMA")


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--arch" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["no row", '{"kernel": "conv"}'])
def test_a_file_of_rows_that_cannot_be_read(tmp_path, text, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{text}\n" if text == "no row" else text)
    with pytest.raises(SystemExit) as ended:
        main(["--known", str(path)])
    assert ended.value.code == 2
    assert re.search(r"rows.jsonl, line 1, is no row of --json", capsys.readouterr().err)


def test_importing_the_package_imports_no_triton():
    code = "import sys, vovnet_fast, vovnet_fast.aot; assert 'triton' not in sys.modules"
    process = start("-c", code)
    _, err = process.communicate()
    assert process.returncode == 0, err
