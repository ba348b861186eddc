"""``vovnet-fast bench report`` on made-up rows, which say nothing about any machine."""

import json
import random
import struct
from pathlib import Path

import pytest

from vovnet_fast import _optional
from vovnet_fast.tools import cli
from vovnet_fast.tools.bench import plots, report, rows, tables, verdicts
from vovnet_fast.tools.bench.plots import networks, roofline

PROVENANCE = {
    "date": "2001-02-03T04:05:06+00:00",
    "commit": "0123456789ab",
    "dirty": False,
    "device": "cuda",
    "gpu": "Made-up GPU",
    "driver": "1.2.3",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "clocks": {"sm_mhz": {"first": 345.0, "last": 1980.0, "least": 345.0, "most": 1980.0}},
}
PEERS = {
    "eager": 1.0,
    "channels_last AMP": 1.25,
    "folded": 1.4,
    "timm": 1.2,
    "torch.compile": 1.6,
    "torch.compile max-autotune, graph": 1.9,
}
OURS = {"fused": 2.1, "fused, graph": 2.6}
CONVS = ((64, 64, 400, 672), (128, 128, 200, 336), (160, 160, 100, 168), (768, 256, 200, 336))

CONV_PROVIDERS = {"eager": 0.3, "torch.compile": 0.45, "tma 128x128": 0.75, "hopper": 0.8}
OP_PROVIDERS = {"eager": 0.2, "torch.compile": 0.6, "triton": 0.85}
BACKENDS = {"tma 128x128": "triton", "hopper": "cuda", "triton": "triton"}


class Rows:
    """Made-up rows of a GPU: all kinds of them, the same ones each time."""

    def __init__(self):
        self.random = random.Random(0)
        self.rows = []

    def add(self, kind, provider, ms, **fields):
        fields |= dict(kind=kind, provider=provider, device_ms=ms)
        fields |= dict(device_ms_p10=ms * 0.98, device_ms_p90=ms * 1.04, device_ms_min=ms * 0.97)
        self.rows.append(fields)

    def near(self, value):
        return value * self.random.uniform(0.9, 1.1)

    def ceilings(self):
        self.add("ceiling", "copy", 0.5, name="copy", gbs=4300.0)
        self.add("ceiling", "matmul", 2.0, name="matmul", dtype="bf16", tflops=790.0)

    def networks(self):
        for spec, scale in (("V-39-eSE", 1.0), ("V-99-eSE", 2.2), ("V-19-slim-dw-eSE", 0.3)):
            for batch in (1, 8):
                eager = 3.0 * scale * batch**0.9
                for provider, speed in (PEERS | OURS).items():
                    self.network("inference", spec, f"{batch}x3x800x1344", provider, eager, speed)
            for provider in ("eager", "checkpointed eager", "folding", "fused"):
                speed = {"eager": 1.0, "checkpointed eager": 0.8, "folding": 1.1, "fused": 1.7}
                self.network(
                    "training", spec, "6x3x640x1600", provider, 60 * scale, speed[provider]
                )

    def network(self, kind, spec, shape, provider, eager, speed):
        ratio = 1.0 if provider == "eager" else self.near(speed)
        training = kind == "training"
        peak = self.near(4000 if training else 800) / (speed if training else 1)
        self.add(
            kind, provider, eager / ratio, spec=spec, shape=shape, dtype="torch.bfloat16",
            backend="triton" if "fused" in provider else None, peak_mib=peak,
            ratio_to_eager=ratio, ratio_low=ratio * 0.97, ratio_high=ratio * 1.02,
            settings=f"the best of {provider}", distance=0.01,
            **{"pass": "step" if training else "forward"},
            **(dict(kept_mib=peak * 0.7) if training else {}),
        )  # fmt: skip

    def operations(self):
        for c_in, c_out, height, width in CONVS:
            for kernel in (1, 3):
                flop = 2 * height * width * c_in * c_out * kernel**2
                moved = 2 * height * width * (c_in + c_out)
                name = f"{kernel}x{kernel} {c_in}>{c_out} on 1x{height}x{width}"
                for provider, part in CONV_PROVIDERS.items():
                    self.operation("conv", name, provider, part, flop, moved)
        moved = 2 * 2 * 200 * 336 * 256
        for name, per_byte in (("eSE", 0.6), ("batch norm", 0.9), ("max pool", 0)):
            for provider, part in OP_PROVIDERS.items():
                self.operation("op", name, provider, part, int(per_byte * moved), moved)

    def operation(self, kind, name, provider, part, flop, moved):
        floor = max(flop / 790e12, moved / 4.3e12) * 1e3
        ms = floor / self.near(part)
        ratio = self.near(part) / 0.3
        self.add(
            kind, provider, ms, name=name, backend=BACKENDS.get(provider), dtype="bfloat16",
            flop=flop, bytes=moved, tflops=flop / ms / 1e9, gbs=moved / ms / 1e6,
            of_matmul=flop / ms / 1e9 / 790, of_copy=moved / ms / 1e6 / 4300, warm_ms=ms * 0.9,
            shape="1x256x200x336", ratio_to_eager=ratio, ratio_low=ratio * 0.98,
            ratio_high=ratio * 1.02, **{"pass": "forward"},
        )  # fmt: skip

    def blocks(self):
        eager = {
            "3x3": 0.30, "1x1": 0.09, "batch norm": 0.12, "ReLU": 0.09, "cat": 0.07,
            "eSE": 0.05, "gate + identity": 0.06,
        }  # fmt: skip
        fused = {"3x3": 0.28, "1x1": 0.09, "eSE": 0.01, "gate + identity": 0.03}
        for name in ("OSA2 of V-39", "OSA3 of V-99"):
            for provider, parts in (("eager", eager), ("fused", fused)):
                backend = "triton" if provider == "fused" else None
                self.add(
                    "block", provider, sum(parts.values()), name=name, parts=parts, dtype="bf16",
                    backend=backend, shape="1x128x200x336", **{"pass": "forward"},
                )  # fmt: skip


def everything():
    made = Rows()
    for part in (made.ceilings, made.networks, made.operations, made.blocks):
        part()
    return made.rows


def written(path, rows, **provenance):
    """A file as pytest-benchmark writes it."""
    benchmarks = [
        {"name": f"test[{i}]", "stats": {"median": row["device_ms"] / 1e3}, "extra_info": row}
        for i, row in enumerate(rows)
    ]
    machine = {"provenance": PROVENANCE | provenance}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
    return path


def section_of(path, made, **provenance):
    [section] = rows.load([written(path, made, **provenance)])
    return section


def network(provider, ratio, kind="inference", spec="V-39-eSE", batch=1, **fields):
    """One row of a network whose eager takes 10 ms."""
    row = dict(kind=kind, provider=provider, spec=spec, shape=f"{batch}x3x224x224", dtype="bf16")
    row |= dict(device_ms=10 / ratio, ratio_to_eager=ratio, backend=None)
    row |= dict(ratio_low=ratio * 0.99, ratio_high=ratio * 1.01) | fields
    return row | {"pass": "forward"}


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of everything, made by the command."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    file = written(folder / "rows.json", everything())
    words = ["bench", "report", str(file), "-o", str(folder / "out"), "--title", "Made up"]
    assert cli.main(words) == 0
    return folder / "out"


def test_the_pictures(made):
    for name in ("roofline", "models", "memory", "batch", "block"):
        content = (made / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert 1000 < width < 3000, name
        assert 400 < height < 4000, name
    text = (made / "report.md").read_text()
    assert {path.name for path in made.iterdir() if f"]({path.name})" in text} == {
        path.name for path in made.glob("*.png")
    }


def test_the_text(made):
    text = (made / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# Made up"
    assert "## Made-up GPU, 2001-02-03, commit 0123456789ab" in lines
    assert "| driver | 1.2.3 |" in lines
    assert "| sm_mhz, seen | 345 to 1980 |" in lines
    assert "| copy |  |  | 4,300 |" in lines
    assert "| Inference of whole networks | 6 | 0 | 0 |" in lines
    for provider in (*PEERS, *OURS, *CONV_PROVIDERS):
        assert f"| {provider} |" in text or f"| **{provider}** |" in text
    assert "- fused, graph: the best of fused, graph" in lines
    assert "- Detectors: no rows." in lines
    assert "- 3 rows only move memory, and are not on the roofline." in lines
    for line in lines:  # Every table has as many cells in every line as in its header.
        if line.startswith("|---"):
            header = lines[lines.index(line) - 1]
            assert header.count("|") == line.count("|")


def test_losses_are_listed_as_wins_are(tmp_path):
    found = section_of(
        tmp_path / "rows.json",
        [
            network("eager", 1.0), network("folded", 1.4), network("ours", 1.9, backend="cuda"),
            network("eager", 1.0, batch=8), network("folded", 1.4, batch=8),
            network("ours", 1.2, batch=8, backend="cuda"),
            network("eager", 1.0, batch=2), network("folded", 1.30, batch=2),
            network("ours", 1.31, batch=2, backend="cuda"),
        ],
    )  # fmt: skip
    text = "".join(verdicts.verdicts(found))
    assert "| Inference of whole networks | 1 | 1 | 1 |" in text
    assert "| V-39-eSE, 8x3x224x224, bf16, forward | ours | folded | 0.86 (0.84 to 0.87)" in text
    table = "".join(tables.networks(found, "inference"))
    assert "| **ours** |" in table
    assert table.index("**ours** | 5.26") < table.index("| folded | 7.14 |"), "the fastest first"


def test_an_interval_of_few_rounds_is_not_taken_for_more(tmp_path):
    few, many = dict(ratio_confidence=0.9375), dict(ratio_confidence=0.96)
    for sure, counts in ((few, "| 0 | 1 | 0 |"), (many, "| 1 | 0 | 0 |")):
        found = section_of(
            tmp_path / "rows.json",
            [
                network("eager", 1.0, **sure), network("folded", 1.4, **sure),
                network("ours", 1.9, backend="cuda", **sure),
            ],
        )  # fmt: skip
        text = "".join(verdicts.verdicts(found))
        assert f"| Inference of whole networks {counts}" in text
        table = "".join(tables.networks(found, "inference"))
        said = "1.90 (1.88 to 1.92, 93 %)" if sure is few else "1.90 (1.88 to 1.92)"
        assert f"| {said} |" in table
        assert not any("how sure" in line for line in verdicts.not_measured(found, {}))
        both = rows.against(found.rows[2], found.rows[1])
        assert both.confidence == pytest.approx(0.875 if sure is few else 0.92)
    assert tables.by_way(both).endswith(")")
    old = section_of(tmp_path / "rows.json", [network("eager", 1.0), network("folded", 1.4)])
    assert "2 rows do not say how sure their intervals are" in "".join(
        verdicts.not_measured(old, {})
    )


def test_pictures_say_how_sure_an_interval_is(tmp_path):
    pytest.importorskip("matplotlib")
    for sure, said in ((0.9375, True), (0.96, False)):
        found = section_of(
            tmp_path / "rows.json",
            [network("eager", 1.0), network("folded", 1.4, ratio_confidence=sure)],
        )
        [figure] = networks.models(found)
        labels = [text.get_text() for text in figure.axes[0].texts]
        assert any(label.endswith("  (93 %)") for label in labels) == said
        assert ("or of what is in brackets" in figure.get_supxlabel()) == said


def test_launches_that_nobody_knows_have_a_reason(tmp_path):
    why = "torch.compile makes kernels of its own, and does not say how many"
    found = section_of(
        tmp_path / "rows.json",
        [
            network("eager", 1.0, launches=164), network("compiled", 1.4, launches_why=why),
            network("eager", 1.0, batch=2), network("compiled", 1.4, batch=2, launches_why=why),
        ],
    )  # fmt: skip
    table = "".join(tables.networks(found, "inference"))
    assert "| 164 |" in table
    assert "Launches are counted, not measured" in table
    text = "".join(verdicts.not_measured(found, {}))
    assert text.count(f"- Launches of compiled: {why}.") == 1


def test_eager_of_the_same_rounds_stands_beside(tmp_path):
    """Its own row may be of a time when the machine was faster."""
    made = [network("eager", 1.0), network("ours", 2.0, backend="cuda", eager_ms=12.5)]
    made += [row | dict(kind="conv", name="3x3") for row in made]
    found = section_of(tmp_path / "rows.json", made)
    assert "| **ours** | 5 | 12.5 |" in "".join(tables.networks(found, "inference"))
    text = "".join(tables.operations(found, "conv"))
    assert "| 5 (ours) |  | 12.5 | eager | 2.00 (1.98 to 2.02)" in text, "measured directly"


def test_inference_and_training_of_detectors_are_told_apart(tmp_path):
    made = [network("eager", 1.0, kind="detector", spec="V-39-eSE") for _ in range(2)]
    made[1]["pass"] = "step"
    text = "".join(tables.networks(section_of(tmp_path / "rows.json", made), "detector"))
    assert "| V-39-eSE | forward | 1x3x224x224 |" in text
    assert "| V-39-eSE | step | 1x3x224x224 |" in text
    text = "".join(tables.networks(section_of(tmp_path / "rows.json", made[:1]), "detector"))
    assert "| pass |" not in text


def test_a_copy_says_little_of_caches(tmp_path):
    made = [dict(kind="ceiling", provider="copy", device_ms=1.0, name="copy", gbs=16.0)]
    for device, said in (("cpu", True), ("cuda", False)):
        found = section_of(tmp_path / "rows.json", made, device=device)
        assert ("fits into the CPU's caches" in "".join(report._ceilings(found))) == said


def test_machines_and_commits_have_sections_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_draw", lambda *_: ({}, {}))
    ours = network("ours", 2.0, backend="cuda")
    files = [
        written(tmp_path / "a.json", [network("eager", 1.0)]),
        written(tmp_path / "b.json", [ours], date="2001-02-04T00:00:00+00:00"),
        written(tmp_path / "c.json", [network("eager", 1.0), ours], commit="fedcba"),
        written(tmp_path / "d.json", [network("eager", 1.0)], gpu="Another GPU", dirty=True),
    ]
    [path] = report.write(files, tmp_path / "out", "Several")
    text = path.read_text()
    assert "measurements of 3 different machines, versions or sources" in text
    assert "must not be compared" in text
    assert "| gpu | Made-up GPU | Made-up GPU | Another GPU |" in text
    assert "| commit | 0123456789ab | fedcba | 0123456789ab |" in text
    headers = [line for line in text.splitlines() if line.startswith("## ")]
    assert sorted(headers) == [
        "## Another GPU, 2001-02-03, commit 0123456789ab with local changes",
        "## Made-up GPU, 2001-02-03 to 2001-02-04, commit 0123456789ab",
        "## Made-up GPU, 2001-02-03, commit fedcba",
    ]
    [together] = rows.load(files[:2])
    assert {row.provider for row in together.rows} == {"eager", "ours"}


def test_what_is_measured_again_replaces_what_was_before(tmp_path):
    early = written(tmp_path / "z.json", [network("eager", 1.0), network("folded", 1.5)])
    late = written(tmp_path / "a.json", [network("folded", 1.25)], date="2001-02-03T09:00:00+00:00")
    [section] = rows.load([late, early])
    assert [row.device_ms for row in section.rows] == [10.0, 8.0]
    assert section.replaced == 1
    assert "1 rows were measured again later" in "".join(verdicts.not_measured(section, {}))


def test_what_is_missing_is_said_and_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = written(tmp_path / "rows.json", [network("eager", 1.0), {"kind": "conv"} | UNKNOWN])
    paths = report.write([file], tmp_path / "out", "Little")
    assert [path.name for path in paths] == ["report.md"]
    text = paths[0].read_text()
    for said in (
        "- Training steps of whole networks: no rows.",
        "- V-39-eSE, 1x3x224x224, bf16, forward: no kernel of this library was measured.",
        "- 1 rows do not say what they measured (kind, provider, device_ms)",
        "- memory.png: no row has peak_mib",
        "- models.png: no network was measured beside eager",
        "- block.png: no row of kind block says what its parts take",
    ):
        assert said in text, said


UNKNOWN = {"device_ms": 1.0}
"""A row without its provider."""


def test_a_roofline_needs_its_ceilings(tmp_path):
    made = Rows()
    made.operations()
    section = section_of(tmp_path / "rows.json", made.rows)
    with pytest.raises(plots.NothingToDraw, match="no rows of kind ceiling"):
        next(roofline.roofline(section))


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(_optional, "why_not", lambda module: f"{module} is broken")
    file = written(tmp_path / "rows.json", [network("eager", 1.0), network("folded", 1.2)])
    [path] = report.write([file], tmp_path / "out", "Text")
    text = path.read_text()
    assert "matplotlib is broken" in text
    assert "| folded | 8.33 |" in text


def test_many_networks_fill_several_pages(tmp_path):
    pytest.importorskip("matplotlib")
    found = [
        network(provider, ratio, batch=batch, peak_mib=5)
        for batch in range(1, networks.MOST_PANELS + 3)
        for provider, ratio in (("eager", 1.0), ("folded", 1.2))
    ]
    section = section_of(tmp_path / "rows.json", found)
    pages = list(networks.models(section))
    assert [len(page.axes) for page in pages] == [networks.MOST_PANELS, 2]


def test_nothing_is_told_apart_by_colour_alone():
    pytest.importorskip("matplotlib")

    def lightness(color):
        r, g, b, _ = color
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    from matplotlib.figure import Figure

    axes = Figure().subplots()
    kinds = [network("ours", 2, backend="cuda"), network("folded", 1.5), network("eager", 1)]
    for y, row in enumerate(kinds):
        networks._bar(axes, y, 1.0, rows._row(row))
    looks = [
        (bar.get_hatch() or "", lightness(bar.get_facecolor()))
        for bar in axes.patches
    ]  # fmt: skip
    for i, (hatch, light) in enumerate(looks):
        for other_hatch, other_light in looks[i + 1 :]:
            assert hatch != other_hatch or abs(light - other_light) > 0.3
    found = [rows._row(network(name, 1)) for name in "abcdefgh"]
    lines = networks._looks(found).values()
    assert len({(line["marker"], line["linestyle"]) for line in lines}) == 8


def test_rows_of_one_command_for_a_gpu(tmp_path):
    """benchmarks/gpu.py puts rows of several runs into one file, without extra_info."""
    path = tmp_path / "benchmarks.json"
    clocks = {"inference": PROVENANCE["clocks"], "conv": {"sm_mhz": {"least": 90, "most": 2000}}}
    content = {"format": 1, "provenance": PROVENANCE, "clocks": clocks}
    content["benchmarks"] = [{"step": "inference", **network("eager", 1.0)}]
    skipped = {"name": "test[timm]", "status": "skipped", "why": "timm is not installed"}
    failed = {"name": "test[x]", "status": "failed", "why": "AssertionError: too far"}
    content["left_out"] = [skipped, failed, skipped]
    path.write_text(json.dumps(content))
    [section] = rows.load([path])
    assert section.device == "Made-up GPU"
    assert section.rows[0].spec == "V-39-eSE"
    assert "sm_mhz, seen | 90 to 2000" in "".join(report._provenance(section))
    assert not list(report._busy(section))
    missing = "".join(verdicts.not_measured(section, {}))
    assert "- 2 benchmarks skipped: timm is not installed\n" in missing
    assert "- 1 benchmark failed: AssertionError: too far\n" in missing


def test_a_busy_machine_is_said(tmp_path):
    load = {"load": {"first": 1.0, "last": 9.3, "least": 1.0, "most": 9.3}}
    made = [network("eager", 1.0)]
    busy = section_of(tmp_path / "a.json", made, gpu=None, cpu="A CPU", cores=8, clocks=load)
    assert "up to 9.3 processes wanted to run on 8 cores" in "".join(report._busy(busy))
    calm = section_of(tmp_path / "b.json", made, gpu=None, cpu="A CPU", cores=16, clocks=load)
    assert not list(report._busy(calm))
    assert busy.device == "A CPU, ? threads"


def test_a_title_says_nothing_twice():
    row = network("eager", 1.0, name="3x3 64>64 on 1x3x224x224 backward", spec="")
    assert rows._row(row | {"pass": "backward"}).title == f"{row['name']}, bf16"
    row = network("eager", 1.0, name="3x3 64>64 on 1x224x224", spec="")
    assert rows._row(row).title == f"{row['name']}, bf16, forward"
    row = network("eager", 1.0, name="V-39-eSE 1x3x224x224")
    assert rows._row(row).title == "V-39-eSE 1x3x224x224, bf16, forward"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "is empty: no benchmark had ended"),
        ("# Markdown", "is not JSON"),
        (b"\x89PNG\xff", "cannot be read"),
        ("[1, 2]", "is JSON, but not of pytest-benchmark"),
        ('{"benchmarks": {}}', "is JSON, but not of pytest-benchmark"),
        ('{"benchmarks": []}', "has no rows: every benchmark was skipped or failed"),
        ('{"benchmarks": [{"name": "a", "extra_info": {}}, 3]}', "none of the 2 rows"),
        ('{"benchmarks": [{"extra_info": {"kind": "x", "provider": "y", "device_ms": 1}}]}',
         "kind, provider and device_ms were expected"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_rows(content, message, tmp_path, capsys):
    good = written(tmp_path / "good.json", [network("eager", 1.0)])
    file, out = tmp_path / "bad.json", tmp_path / "out"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["bench", "report", str(good), str(file), "-o", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vovnet-fast bench: ")
    assert len(error.splitlines()) == 1
    assert f"{file}" in error
    assert message in error
    assert "pytest benchmarks/ --benchmark-only --benchmark-json=FILE" in error
    assert not out.exists()


def test_the_report_is_not_written_over_a_file(tmp_path, capsys):
    file = written(tmp_path / "rows.json", [network("eager", 1.0)])
    before = Path(file).read_bytes()
    assert cli.main(["bench", "report", str(file), "-o", str(file)]) == 1
    assert "is a file, and the report needs a folder" in capsys.readouterr().err
    assert Path(file).read_bytes() == before
