"""The figures of the README are those of committed files, and these are what the code counts."""

import json
from pathlib import Path

import pytest

from vovnet_fast.plan import plan_forward
from vovnet_fast.training_memory import training_memory

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
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
    pytest.importorskip("triton", reason="launches are planned with Triton")
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
