"""Small architectures with every feature of their dialect, for tests that must be quick."""

from dataclasses import replace

from vovnet_fast import specs
from vovnet_fast.specs import VoVNetSpec

_SMALL = {
    "mid_channels": (8, 8, 16, 16),
    "out_channels": (16, 24, 32, 40),
    "layers_per_block": 2,
    "blocks_per_stage": (1, 2, 1, 2),
}

TINY: dict[str, VoVNetSpec] = {
    dialect: replace(specs.get(like), name=f"tiny-{dialect}", stem_channels=(8, 8, 16), **_SMALL)
    for dialect, like in (
        ("detectron2", "V-39-eSE"),
        ("timm", "ese_vovnet39b"),
        ("seed", "vovnet-39"),
        ("torchhub", "V-39"),
    )
}
TINY["depthwise"] = replace(
    TINY["detectron2"], name="tiny-depthwise", depthwise=True, stem_channels=(8, 8, 8)
)
# What it alone has is a block that adds its input and has no gate; the rest is the others'.
TINY["torchhub"] = replace(TINY["torchhub"], blocks_per_stage=(1, 2, 1, 1))

FIRST = ("stage2", "stage3")
"""Features of the stages that have all kinds of blocks, and a pool between them: the first of a
stage, and one that adds its input. torch traces longer the more blocks there are; where a test's
time is its tracing, the two stages after these would only be more of the same."""
