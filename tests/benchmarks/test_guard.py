"""Counts that do not depend on the machine are the committed ones; the guard itself works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the kernels are compiled with Triton")

from benchmarks import counts, guard, sass

ROOT = Path(__file__).parents[2]


def test_counts_are_the_committed_ones():
    """In a process where Triton compiles."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.guard", "--json"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for note in found["notes"]:
        print(note)
    differences = [guard.Difference(**difference) for difference in found["differences"]]
    assert not differences, "\n" + guard.report(differences)


def test_few_kernels_are_compiled():
    """What a change may not give up, whatever else it counts anew."""
    found = json.loads((ROOT / "docs" / "counts.json").read_text())["counts"]["compiled kernels"]
    [inference], sizes = (
        numbers.values() for row, numbers in found.items() if not row.startswith("forward pass")
    )
    assert inference <= 45
    one, many = sizes
    assert many <= 1.1 * one


def test_the_convolution_for_hopper_asks_little_of_l2():
    """What its arithmetic is for: wide layers wait for L2 where tensor cores could be busy."""
    found = json.loads((ROOT / "docs" / "counts.json").read_text())["counts"]
    rows = found["convolution for Hopper"]
    assert len(rows) == 32
    for row, numbers in rows.items():
        least = 150 if row.startswith("3x3 64>64") else 200
        assert numbers["FLOP a byte from L2"] >= least, row


# --------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------

KERNELS = "kernels for sm_90"
STEP = "training step, fixed norms"
FORWARD = "forward pass"
COUNTS = {
    KERNELS: {"conv": {"registers": 100, "multiply-adds an instruction": 2000.0, "HGMMA": 4}},
    STEP: {"V-39": {"launches forward": 60}},
    FORWARD: {"V-39": {"launches": 60, "bytes": 1000}},
}


def changed(section, row, **numbers):
    copy = json.loads(json.dumps(COUNTS))
    copy[section].setdefault(row, {}).update(
        {name.replace("_", " "): number for name, number in numbers.items()}
    )
    return copy


def only(found):
    assert len(found) == 1
    return found[0]


def test_the_same_counts():
    assert guard.compare(COUNTS, COUNTS) == []
    assert guard.report([]) == ""


@pytest.mark.parametrize(
    ("section", "name", "new", "text"),
    [
        (FORWARD, "launches", 66, "worse: forward pass: V-39: launches 60 -> 66 (+10.0 %)"),
        (FORWARD, "bytes", 900, "better: forward pass: V-39: bytes 1,000 -> 900 (-10.0 %)"),
        (
            KERNELS, "multiply-adds_an instruction", 1500.0,
            "worse: kernels for sm_90: conv: multiply-adds an instruction 2,000.0 -> 1,500.0 "
            "(-25.0 %)",
        ),
        (KERNELS, "HGMMA", 8, "changed: kernels for sm_90: conv: HGMMA 4 -> 8 (+100.0 %)"),
        (FORWARD, "GFLOP", 3, "new: forward pass: V-39: GFLOP nothing -> 3"),
    ],
)  # fmt: skip
def test_one_difference(section, name, new, text):
    row = "conv" if section == KERNELS else "V-39"
    found = guard.compare(COUNTS, changed(section, row, **{name: new}))
    assert str(only(found)) == text
    advice = "got worse. If" if text.startswith("worse") else "Record it, so that it cannot be lost"
    assert guard.report(found).startswith(text)
    assert advice in guard.report(found)
    assert guard.UPDATE in guard.report(found)


def test_rows_that_are_gone_and_the_order():
    before = changed(FORWARD, "V-99", launches=150)
    after = changed(FORWARD, "V-39", launches=59, bytes=1001)
    found = guard.compare(before, after)
    assert [difference.verdict for difference in found] == ["worse", "gone", "better"]
    assert str(found[1]) == "gone: forward pass: V-99: launches 150 -> nothing"
    assert str(only(guard.compare({"a": {"b": {"c": 0}}}, {"a": {"b": {"c": 2}}}))).endswith(
        "0 -> 2"
    )


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of :data:`COUNTS`, which are also what is counted."""
    monkeypatch.setattr(guard, "count", lambda compiling=True: COUNTS)
    guard.write(COUNTS, tmp_path / "counts.json")
    assert json.loads((tmp_path / "counts.json").read_text())["counts"] == COUNTS
    return tmp_path / "counts.json"


def test_command_fails_when_something_is_worse(file, monkeypatch, capsys):
    assert guard.main(["--file", str(file)]) == 0
    assert "as in" in capsys.readouterr().out
    worse = changed(KERNELS, "conv", registers=120)
    monkeypatch.setattr(guard, "count", lambda compiling=True: worse)
    assert guard.main(["--file", str(file)]) == 1
    out = capsys.readouterr().out
    assert "worse: kernels for sm_90: conv: registers 100 -> 120 (+20.0 %)" in out
    assert guard.main(["--file", str(file), "--update"]) == 0
    assert "1 numbers differ" in capsys.readouterr().out
    assert guard.main(["--file", str(file)]) == 0


def test_an_improvement_has_to_be_recorded(file, monkeypatch, capsys):
    better = changed(KERNELS, "conv", registers=80)
    monkeypatch.setattr(guard, "count", lambda compiling=True: better)
    assert guard.main(["--file", str(file)]) == 1
    assert "Nothing got worse. Record it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("library", "left_out", "compared"),
    [("triton", KERNELS, (STEP, FORWARD)), ("torch", STEP, (KERNELS, FORWARD))],
)
def test_another_version_is_said_and_the_rest_compared(
    file, monkeypatch, library, left_out, compared
):
    here = guard.versions() | {library: "99"}
    monkeypatch.setattr(guard, "versions", lambda: here)
    asked = []
    worse = {section: {"x": {"y": 1}} for section in COUNTS}
    monkeypatch.setattr(guard, "count", lambda compiling=True: asked.append(compiling) or worse)
    found, notes = guard.check(file)
    assert {difference.section for difference in found} == set(compared)
    assert asked == [library != "triton"]  # Nothing is compiled in vain.
    assert left_out in only(notes)
    assert "99" in only(notes)


def test_a_hot_kernel_that_is_not_shipped(monkeypatch):
    monkeypatch.setattr(counts.aot, "jobs", lambda arch: [])
    with pytest.raises(LookupError, match=r"no kernel conv, .* is shipped for sm_90"):
        next(counts.kernels("sm_90"))


# --------------------------------------------------------------------------------------
# Reading SASS
# --------------------------------------------------------------------------------------


def disassembly(text):
    """Addresses in front of instructions, as nvdisasm prints them."""
    lines = []
    for number, line in enumerate(text.strip().splitlines()):
        line = line.strip()
        label = line.endswith(":")
        lines.append(f".{line}" if label else f"        /*{16 * number:04x}*/    {line} ;")
    return "\n".join(lines)


def names(loop):
    return [one.name for one in loop]


WAITING = disassembly("""
    MOV R1, c[0x0][0x28]
    L_x_2:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9]
    @!P0 BRA `(.L_x_0)
    L_x_3:
    NOP
    HGMMA.64x256x16.F32 R24, gdesc[UR8], R24, gsb0
    @UP0 UTMALDG.4D [UR8], [UR6]
    @P0 BRA `(.L_x_2)
    STG.E.128 desc[UR6][R2.64], R4
    EXIT
    L_x_0:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9]
    @!P0 BRA `(.L_x_0)
    BRA `(.L_x_3)
    L_x_4:
    BRA `(.L_x_4)
    NOP
""")


def test_waiting_out_of_line_is_not_the_loop():
    """The jump back from behind the kernel's end spans the epilogue, and is no loop."""
    loop = sass.hot_loop(WAITING)
    assert names(loop) == [
        "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "HGMMA.64x256x16.F32", "UTMALDG.4D", "BRA"
    ]  # fmt: skip
    assert sass.multiply_adds(loop) == 64 * 256 * 16 // 4
    assert sass.counts(loop) == {"SYNCS": 1, "BRA": 2, "HGMMA": 1, "UTMALDG": 1}
    # The waiting, its two jumps and the end are the kernel's; NOP and the trap are not.
    assert len(sass.instructions(WAITING)) == 11


PERSISTENT = disassembly("""
    L_x_0:
    S2R R0, SR_CTAID.X
    L_x_1:
    @P0 BRA `(.L_x_2)
    IMAD R1, R1, R2, R3
    IMAD R1, R1, R2, R3
    L_x_2:
    HGMMA.64x128x16.F32 R24, gdesc[UR8], R24
    @P1 BRA `(.L_x_3)
    STG.E.128 desc[UR6][R2.64], R4
    L_x_3:
    @P3 BRA `(.L_x_4)
    UTMALDG.4D [UR8], [UR6]
    L_x_4:
    @P2 BRA `(.L_x_1)
    @P4 BRA `(.L_x_0)
    EXIT
""")


def test_the_epilogue_of_a_persistent_loop_is_jumped_over():
    """And the copies are not, nor does the loop around it count."""
    assert names(sass.hot_loop(PERSISTENT)) == [
        "BRA", "HGMMA.64x128x16.F32", "BRA", "BRA", "UTMALDG.4D", "BRA"
    ]  # fmt: skip


def test_the_loop_and_not_its_rest():
    text = disassembly("""
        @P0 BRA `(.L_x_1)
        L_x_0:
        HMMA.16816.F32 R4, R8, R12, R4
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        LDGSTS.E.BYPASS.128 [R65], [R46.64], P5
        @P1 BRA `(.L_x_0)
        L_x_1:
        HMMA.1688.F32.TF32 R4, R8, R12, R4
        @P2 BRA `(.L_x_1)
        EXIT
    """)
    loop = sass.hot_loop(text)
    assert len(loop) == 4
    assert sass.multiply_adds(loop) == 2 * 16 * 8 * 16


@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [
        ("IGMMA.64x128x32.S8.S8", 64 * 128 * 32 // 4),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", 64 * 64 * 32 // 4),
        ("IMMA.16832.S8.S8.SAT", 16 * 8 * 32),
        ("IMMA.16816.S8.S8", 16 * 8 * 16),
        ("QMMA.16832.F32.E4M3.E4M3", 16 * 8 * 32),
        ("HFMA2.MMA", 0),
    ],
)
def test_products_of_eight_bits(name, multiply_adds):
    text = f"L_x_0:\n{name} R4, R8, R12, R4\n@P0 BRA `(.L_x_0)\nEXIT"
    assert sass.multiply_adds(sass.hot_loop(disassembly(text))) == multiply_adds


def test_hot_kernels_multiply_bytes_as_such():
    """And not in another format after a conversion."""
    found = json.loads((ROOT / "docs" / "counts.json").read_text())["counts"]
    for arch, form, product in (
        ("sm_80", "int8", "IMMA"),
        ("sm_89", "fp8", "QMMA"),
        ("sm_90", "int8", "IGMMA"),
        ("sm_90", "fp8", "QGMMA"),
    ):
        rows = {
            row: numbers
            for row, numbers in found[f"kernels for {arch}"].items()
            if row.startswith("conv") and f" {form}," in row
        }
        assert len(rows) > 1
        for row, numbers in rows.items():
            assert [name for name in sass.PRODUCTS if name in numbers] == [product], row
            assert numbers["spilled bytes"] == 0, row


def test_without_a_loop():
    for body in (
        "HMMA.16816.F32 R4, R8, R12, R4\nEXIT",
        "L_x_0:\nLDG.E R1, [R2.64]\n@P0 BRA `(.L_x_0)\nEXIT",
    ):
        assert sass.hot_loop(disassembly(body)) == []


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match="what nvdisasm -c printed"):
        sass.blocks("no such thing")
    with pytest.raises(ValueError, match="BRA leads to L_x_9, which is not in this text"):
        sass.blocks(disassembly("BRA `(.L_x_9)"))
    with pytest.raises(ValueError, match=r"HMMA\.99999\.F32 multiplies matrices of unknown shape"):
        sass.hot_loop(disassembly("L_x_0:\nHMMA.99999.F32 R4\n@P0 BRA `(.L_x_0)\nEXIT"))
    cold = disassembly("""
        L_x_0:
        BRA `(.L_x_2)
        L_x_1:
        @P0 BRA `(.L_x_0)
        EXIT
        L_x_2:
        HMMA.16816.F32 R4, R8, R12, R4
        BRA `(.L_x_1)
    """)
    with pytest.raises(ValueError, match="no way from block 0 leads to block 1"):
        sass.hot_loop(cold)


def test_numbers_of_a_kernel():
    row = counts.aot.Row("conv", "", "", "sm_90", 8, 90, 0, 1000, 2, {}, True, "")
    loop = counts.kernel_numbers(row, WAITING)
    assert loop["loop instructions"] == 5
    assert loop["multiply-adds an instruction"] == round(64 * 256 * 16 / 4 / 5, 1)
    assert (loop["registers"], loop["CTAs an SM"], loop["UTMALDG"]) == (90, 2, 1)
    moving = disassembly("LDG.E.128 R4, [R2.64]\nLDG.E.64 R4, [R2.64]\nSTG.E R1, [R2.64]\nEXIT")
    found = counts.kernel_numbers(row, moving)
    assert found["narrow loads and stores"] == 2
    assert "loop instructions" not in found
    unrolled = disassembly("HMMA.16816.F32 R4, R8, R12, R4\nLDSM.16.M88.4 R4, [R2]\nEXIT")
    found = counts.kernel_numbers(row, unrolled)
    assert (found["HMMA"], found["LDSM"]) == (1, 1)
    assert found["multiply-adds an instruction"] == round(16 * 8 * 16 / 3, 1)
