"""The figures of the README are those of committed files, and these are what the code counts."""

import json
import re
from pathlib import Path

import pytest

from vovnet_fast.tools.memory import training_memory
from vovnet_fast.tools.plan import plan_forward

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CPUS = (RESULTS / "cpu.md").read_text(encoding="utf-8")
MEMORY = json.loads((ROOT / "docs/training_memory.json").read_text())
PLAN = json.loads((ROOT / "docs/plan.json").read_text())


@pytest.mark.parametrize("written", MEMORY, ids=lambda w: f"{w['spec']}-{w['norm_eval']}")
def test_training_memory(written):
    counted = training_memory(
        written["spec"], tuple(written["shape"]), dtype=written["dtype"],
        norm_eval=written["norm_eval"],
    )  # fmt: skip
    kept = [row["kept"] for row in written["rows"]]
    assert [row.kept for row in counted.rows] == kept
    assert " | ".join(f"{value / 1e9:.2f} GB" for value in kept) in README


def test_traffic():
    pytest.importorskip("triton", minversion="3.6", reason="launches are planned with Triton")
    counted = plan_forward(PLAN["spec"], tuple(PLAN["shape"]), dtype=PLAN["dtype"])
    for path, words in (
        ("fused", "{launches} launches and {gigabytes:.1f} GB"),
        ("eager", "{launches} and {gigabytes:.1f} GB"),
    ):
        total = getattr(counted, path).total
        rows = PLAN[path]["rows"]
        assert sum(row["launches"] for row in rows) == total.launches
        moved = sum(row["bytes_read"] + row["bytes_written"] for row in rows)
        assert moved == total.bytes_moved
        text = words.format(launches=total.launches, gigabytes=moved / 1e9)
        assert text in " ".join(README.split()), text


def measured(path):
    """When, of a committed measurement; several are made in a day."""
    return json.loads(path.read_text(encoding="utf-8"))["provenance"]["date"]


def newest(name):
    """The last committed measurement of this name."""
    return json.loads(max(RESULTS.glob(f"*/{name}"), key=measured).read_text(encoding="utf-8"))


def committed(*names):
    """All committed measurements of these names."""
    return [
        pytest.param(path, id=f"{path.parent.name}-{path.stem}")
        for name in names
        for path in sorted(RESULTS.glob(f"*/{name}"), key=measured)
    ]


def told(path):
    """A committed measurement, and the page that tells it, the README or that of processors."""
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["provenance"]["dirty"] is False
    page = README if f"{path.parent.name}/{path.stem}.md" in README else CPUS
    assert f"{path.parent.name}/{path.stem}.md" in page
    assert f"t commit {found['provenance']['commit'][:8]}" in " ".join(page.split())
    return found, page


PEERS = ("fused-cpu", "compiled-folded", "openvino", "onnxruntime")


def interval(row):
    return "{ratio_to_eager:.2f} ({ratio_low:.2f} to {ratio_high:.2f})".format(**row)


@pytest.mark.parametrize("path", committed("V-39-eSE-320.json"))
def test_ratios_on_a_cpu(path):
    """Every row of the table is the one that was measured."""
    found, page = told(path)
    rows = {(row["dtype"], row["peer"]): row for row in found["rows"]}
    for peer in (*PEERS, "eager-NCHW"):
        both = [rows[dtype, peer] for dtype in ("fp32", "bf16")]
        cells = [interval(row) for row in both if "missing" not in row]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("path", committed("frozen-fp32.json", "frozen-bf16.json"))
def test_ratios_of_frozen_networks(path):
    found, page = told(path)
    there = {row["peer"] for row in found["rows"] if "missing" not in row}
    assert len(there.intersection(PEERS)) >= 3
    for peer in there.intersection(PEERS):
        cells = [interval(row) for row in found["rows"] if row["peer"] == peer]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("path", committed("frozen-avx2.json"))
def test_times_of_a_frozen_network_on_avx2(path):
    found, page = told(path)
    assert "VOVNET_FAST_CPU_ISA=avx2" in found["provenance"]["forced"]
    times = {row["dtype"]: row["ms"] for row in found["rows"] if row["peer"] == "fused-cpu"}
    bf16, fp32 = f"{times['bf16']:.0f} ms in bf16", f"{times['fp32']:.0f} in fp32"
    assert re.search(rf"V-39-eSE (takes|took) {bf16} (there )?and {fp32}", " ".join(page.split()))
    if page is README:
        plain = {row["dtype"]: row["ms"] for row in found["rows"] if row["peer"] == "eager"}
        assert f"plain PyTorch {plain['bf16']:.0f} and {plain['fp32']:.0f}" in " ".join(
            page.split()
        )


@pytest.mark.parametrize(
    "name", ["frozen-fp32", "frozen-bf16", "frozen-avx2", "eight-bits", "not-frozen"]
)
def test_the_readme_has_what_was_measured_last(name):
    last = max(RESULTS.glob(f"*/{name}.json"), key=measured)
    assert f"{last.parent.name}/{name}.md" in README


def test_the_picture_is_of_the_last_run():
    def drawn(picture):
        report = (picture.parent / "report.md").read_text(encoding="utf-8")
        return re.search(r"\| measured \| (\S+) \|", report)[1]

    last = max(RESULTS.glob("*/models.png"), key=drawn)
    assert f"{last.parent.name}/models.png" in README
    assert f"{last.parent.name}/report.md" in README


def test_the_summary():
    """What a reader sees first is what the tables say."""
    rows = newest("frozen-fp32.json")["rows"]
    frozen = {row["peer"]: row for row in rows if (row["spec"], row["size"]) == ("V-39-eSE", 320)}
    ratios = [frozen[peer]["ratio_to_eager"] for peer in ("fused-cpu", "onnxruntime", "openvino")]
    words = (
        "{:.2f} times as fast as eager on a 320x320 image (ONNX Runtime {:.2f}, OpenVINO {:.2f})"
    )
    assert words.format(*ratios) in README
    steps = [
        row["ratio_to_eager"]
        for row in newest("not-frozen.json")["rows"]
        if re.fullmatch(r"V-39-eSE, .*, training, float32", row["what"])
        and row["who"].startswith("auto")
    ]
    assert len(steps) == 4
    assert f"its training step {min(steps):.2f} to {max(steps):.2f} times" in README


@pytest.mark.parametrize("path", committed("not-frozen*.json"))
def test_ratios_of_what_is_not_frozen(path):
    """Every cell of a table has both layouts as they were measured; what is behind is in bold."""
    found, text = told(path)
    shown = text is README
    forced = found["provenance"].get("forced", "")
    assert all(f"`{each}`" in text for each in forced.split())
    rows = {(row["what"], row["who"]): row["ratio_to_eager"] for row in found["rows"]}
    for spec in dict.fromkeys(what.partition(",")[0] for what, _ in rows):
        for dtype in dict.fromkeys(what.rpartition(", ")[2] for what, _ in rows):
            cells = []
            for what in ("1x{0}x{0}, inference", "2x{0}x{0}, training"):
                for size in (64, 224):
                    kind = f"{spec}, {what.format(size)}, {dtype}"
                    ratios = [rows[kind, f"auto, {layout}"] for layout in ("NCHW", "channels_last")]
                    cells.append(
                        ", ".join(f"{r:.2f}" if r > 0.97 else f"**{r:.2f}**" for r in ratios)
                    )
            name = spec if dtype == "float32" else f"{spec}, bf16"
            assert f"| {name} | {' | '.join(cells)} |" in text
    ours = [row for row in found["rows"] if row["who"].startswith("auto")]
    if shown:
        behind = [row for row in ours if row["ratio_to_eager"] <= 0.97]
        assert all(row["ratio_high"] > 1 for row in behind)  # None is so for sure.
        least = min(row["ratio_to_eager"] for row in ours)
        assert f"{len(behind)} of the {len(ours)} ratios" in " ".join(text.split())
        assert f"the least {least:.2f}" in " ".join(text.split())
    control = [row for row in found["rows"] if row["who"].startswith("plain again")]
    if shown and control:
        ratios = [row["ratio_to_eager"] for row in control]
        alone = sorted(ratio for row in control for ratio in row["ratios"])
        ends = (alone[round(share * (len(alone) - 1))] for share in (0.05, 0.95))
        words = "were {:.2f} to {:.2f}, and {:.2f} to {:.2f} in nine of ten processes"
        assert words.format(min(ratios), max(ratios), *ends) in " ".join(text.split())


def test_what_eight_bits_cost_a_detector():
    """Every cell of both tables is as measured, and int8 costs no more than half a point of mAP."""
    found = newest("accuracy.json")
    assert found["provenance"]["dirty"] is False
    assert f"at commit {found['provenance']['commit'][:8]}" in README
    formats: dict = {}
    choices: dict = {}
    for row in found["rows"]:
        if row["table"] == "formats":
            formats.setdefault(row["format"], []).append(_cost(row))
            if row["format"].startswith("int8"):
                assert row["mAP_minus_fp32"] > -0.005
        else:
            choices.setdefault((row["format"], row["choice"]), []).append(row["least_sqnr_db"])
    for name, cells in formats.items():
        assert f"| {name} | {' | '.join(cells)} |" in README
    page = (ROOT / "docs/quantization.md").read_text(encoding="utf-8")
    for (name, choice), values in choices.items():
        cells = " | ".join(f"{value:.1f}" for value in values)
        assert f"| {name}, {choice} | {cells} |" in page


def _cost(row):
    gap = [row.get(f"mAP_minus_{end}") for end in ("fp32", "low", "high")]
    if gap[0] is None:
        text = f"mAP {100 * row['bbox_mAP']:.1f}"
    else:
        text = "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * each for each in gap))
    speed = f"{row['ratio_to_eager']:.2f}" if "ms" in row else "not timed"
    return f"{text}, {row['least_sqnr_db']:.1f} dB, {speed}"


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *RESULTS.glob("*.md")]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def headings(page):
    """As links name them."""
    found = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_is_linked_is_there(page):
    """Files, and headings of pages."""
    for target in re.findall(r"\]\(\s*([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        file, _, heading = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not heading or heading in headings(there), target


@pytest.mark.parametrize("path", committed("eight-bits.json", "eight-bits-avx2.json"))
def test_times_in_eight_bits(path):
    """Every cell is the time of a peer over ours as measured, with its signal-to-noise ratio."""
    found, page = told(path)
    rows: dict = {}
    for row in found["rows"]:
        if "missing" not in row:
            rows.setdefault((row["peer"], row["precision"]), []).append(row)
    for (peer, precision), cells in rows.items():
        written = [f"{row['ratio_to_ours']:.2f}, {row['least_sqnr_db']:.1f} dB" for row in cells]
        assert f"| {peer}, {precision} | {' | '.join(written)} |" in page
