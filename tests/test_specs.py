import dataclasses
from typing import get_args

import pytest

from vovnet_fast import specs

from . import straight_line


@pytest.mark.parametrize("name", straight_line.BUILDERS)
def test_numbers_are_the_published_ones(name):
    spec = specs.get(name)
    mid, out, layers, blocks, depthwise = straight_line.BUILDERS[name][1][:5]
    assert spec.mid_channels == tuple(mid)
    assert spec.out_channels == tuple(out)
    assert spec.layers_per_block == layers
    assert spec.blocks_per_stage == tuple(blocks)
    assert spec.depthwise == depthwise
    assert spec.stem_channels == ((64, 64, 64) if depthwise else (64, 64, 128))


def test_every_published_name_and_no_other():
    assert specs.names() == list(straight_line.BUILDERS)
    assert [len(specs.names(d)) for d in get_args(specs.Dialect)] == [7, 8, 7, 3]


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("v-39-ese", "V-39-eSE"),
        (" V-99-eSE ", "V-99-eSE"),
        ("ese_vovnet19b_dw.ra_in1k", "ese_vovnet19b_dw"),
        ("timm/ese_vovnet39b.ra_in1k", "ese_vovnet39b"),
        ("hf-hub:timm/ese_vovnet39b.ra_in1k", "ese_vovnet39b"),
        ("VoVNet-39", "vovnet-39"),
        ("vovnet39", "V-39"),
        ("vovnet57", "V-57"),
        ("vovnet27_slim", "V-27-slim"),
        ("vovnet27s", "V-27-slim"),
    ],
)
def test_spellings(written, canonical):
    assert specs.get(written).name == canonical


def test_unknown_names_list_close_matches():
    with pytest.raises(specs.UnknownSpecError, match=r"'V-93-eSE'.*did you mean.*V-99-eSE"):
        specs.get("V-93-eSE")
    with pytest.raises(specs.UnknownSpecError, match=r"known names: V-19-slim-dw-eSE, .*vovnet-99"):
        specs.get("resnet50")
    with pytest.raises(TypeError, match="int: 39"):
        specs.get(39)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mid_channels", (64, 80, 96), "mid_channels must be a tuple of 4"),
        ("blocks_per_stage", (1, 1, 0, 1), "blocks_per_stage must be a tuple of 4 positive"),
        ("layers_per_block", 0, "layers_per_block"),
        ("gate", "swish", "gate must be one of hard_sigmoid, sigmoid, got 'swish'"),
        ("pool", "floor", "pool must be one of"),
        ("depthwise", True, "depthwise stem needs three equal widths"),
    ],
)
def test_bad_specs_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(specs.get("V-39-eSE"), **{field: value})


def test_dialects_agree_only_where_they_do():
    for name in specs.names("detectron2"):
        agrees = not specs.differences(specs.get(name), "timm")
        assert agrees == name.startswith("V-19"), name
    for name in specs.names("timm"):
        agrees = not specs.differences(specs.get(name), "detectron2")
        assert agrees == ("19b" in name), name
    for name in specs.names("seed"):
        reasons = " ".join(specs.differences(specs.get(name), "detectron2"))
        for what in ("strides", "pool mode", "bias", "gate"):
            assert what in reasons
    assert "OSA4_1 has an eSE gate in V-39-eSE, timm has none" in specs.differences(
        specs.get("V-39-eSE"), "timm"
    )


def test_the_two_of_2019_differ_in_identities_alone():
    """timm's v1 networks add none, torch.hub's do in every block but the first of a stage."""
    for ours, timm in (("V-39", "vovnet39a"), ("V-57", "vovnet57a")):
        assert specs.twins(specs.get(ours)) == [timm]
        assert specs.twins(specs.get(timm)) == [ours]
        for reasons in (
            specs.differences(specs.get(ours), "timm"),
            specs.differences(specs.get(timm), "torchhub"),
        ):
            assert reasons
            assert all("identity add" in reason for reason in reasons)
    assert not specs.differences(specs.get("V-27-slim"), "timm")  # It has one block a stage.
    alone = [name for name in specs.names() if not specs.twins(specs.get(name))]
    assert len(alone) == len(specs.names()) - 4
    assert specs.differences(specs.get("V-39-eSE"), "torchhub")[0] == (
        "OSA2_1 has an eSE gate in V-39-eSE, torchhub has none"
    )
    plain = dataclasses.replace(specs.get("V-19-dw-eSE"), ese="none")
    assert specs.differences(plain, "torchhub") == [
        "depthwise layers: V-19-dw-eSE has them, torchhub has none"
    ]
