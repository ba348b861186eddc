"""Networks that are not frozen against plain PyTorch, by ``python -m benchmarks.cpu``."""

import json
import sys

import pytest
import torch

from benchmarks import cpu, unfrozen
from tests.extension_cases import require

SPEC = "V-19-slim-dw-eSE"


@pytest.fixture(autouse=True)
def _built():
    require("cpu")


def test_the_command(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results"
    arguments = f"--not-frozen --train --spec {SPEC} --sizes 32 --dtypes fp32 --rounds 5"
    monkeypatch.setattr(
        sys, "argv", ["cpu", *arguments.split(), "--threads", "1", "--out", str(out)]
    )
    cpu.main()
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    always = {
        f"{who}, {layout}"
        for who in ("plain", "auto", unfrozen.CONTROL)
        for layout in unfrozen.LAYOUTS
    }
    whats = list(dict.fromkeys(row["what"] for row in rows))
    assert whats == [f"{SPEC}, 1x32x32, inference, float32", f"{SPEC}, 2x32x32, training, float32"]
    for what, more in zip(whats, (set(), {"cpu, channels_last"})):
        assert {row["who"] for row in rows if row["what"] == what} == always | more
    for row in rows:  # The better plain one is compared with itself.
        assert row["better"] in unfrozen.PLAIN
        if row["who"] == row["better"]:
            assert row["ratio_to_eager"] == 1
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    worst = min(row["ratio_to_eager"] for row in rows if row["who"].startswith("auto"))
    assert f"Least ratio over all rows of auto: {worst:.2f}" in text
    assert "A second plain network to the first: " in text
    worst = min(row["ratio_to_same_layout"] for row in rows if row["who"].startswith("auto"))
    assert f"Least ratio to plain PyTorch in the same layout: {worst:.2f}" in text
    assert text in capsys.readouterr().out + "\n"


def test_what_is_better_is_found_by_the_median():
    kind = unfrozen.Kind(SPEC, (1, 32, 32), torch.float32, False)
    times = {"plain, NCHW": [1, 9, 3], "plain, channels_last": [2, 2, 9], "auto, NCHW": [4, 4, 4]}
    row = unfrozen._row(kind, "auto, NCHW", [times])
    assert row["better"] == "plain, channels_last"
    assert row["ratio_to_eager"] == 0.5
    assert row["ratio_to_same_layout"] == 0.75
    behind = {**row, "ratio_to_eager": 0.4}
    assert (
        unfrozen.least([row, behind, {**row, "who": "plain, NCHW", "ratio_to_eager": 0.1}])
        is behind
    )
    assert unfrozen.least([]) is None


def test_several_processes_have_a_ratio_each():
    kind = unfrozen.Kind(SPEC, (1, 32, 32), torch.float32, False)
    plain = {"plain, NCHW": [2.0, 2.0], "plain, channels_last": [4.0, 4.0]}
    control = f"{unfrozen.CONTROL}, channels_last"
    processes = [
        {**plain, "auto, NCHW": [2 / ratio, 2 / ratio], control: [4 / ratio, 4 / ratio]}
        for ratio in (1.5, 0.9, 1.1)
    ]
    row = unfrozen._row(kind, "auto, NCHW", processes)
    assert row["ratios"] == pytest.approx([1.5, 0.9, 1.1])
    assert [row[f"ratio_{end}"] for end in ("to_eager", "low", "high")] == pytest.approx(
        [1.1, 0.9, 1.5]
    )
    row = unfrozen._row(kind, control, processes)
    assert row["ratios"] == pytest.approx([1.5, 0.9, 1.1])  # Of the same layout, not the better.
    text = "\n".join(unfrozen.table([row], 3))
    assert "medians of 3 processes" in text
    assert "A second plain network to the first: 1.10 to 1.10." in text


def test_processes_build_networks_of_their_own():
    kind = unfrozen.Kind(SPEC, (1, 32, 32), torch.float32, False)
    rows = unfrozen.measure(kind, rounds=2, seconds=60, threads=1, processes=2)
    assert {len(row["ratios"]) for row in rows} == {2}
    assert not any(
        row["ratios"][0] == row["ratios"][1] for row in rows if row["who"] != row["better"]
    )


@pytest.mark.parametrize("name", ["processes", "rounds", "threads"])
def test_numbers_that_are_none(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cpu", "--not-frozen", f"--{name}", "0"])
    with pytest.raises(SystemExit):
        cpu.main()
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err


def test_what_was_found_is_kept_when_a_run_is_interrupted(monkeypatch, tmp_path):
    found = iter([[{"what": "one"}], KeyboardInterrupt()])

    def measure(*_):
        rows = next(found)
        if isinstance(rows, BaseException):
            raise rows
        return rows

    monkeypatch.setattr(unfrozen, "measure", measure)
    monkeypatch.setattr(unfrozen, "table", lambda rows, processes: [f"{len(rows)} rows"])
    out = tmp_path / "new" / "torch-2.13"
    words = ["cpu", "--not-frozen", "--dtypes", "fp32", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        cpu.main()
    kept = json.loads((out.parent / "torch-2.13.json").read_text(encoding="utf-8"))
    assert kept["rows"] == [{"what": "one"}]
    assert kept["provenance"]["threads"] == 1
    assert "1 rows" in (out.parent / "torch-2.13.md").read_text(encoding="utf-8")
    assert len([*out.parent.iterdir()]) == 2
