"""Files of the VoVNet of 2019: torch.hub's, pytorchcv's, and timm's, which is another function."""

import warnings
from collections import OrderedDict

import pytest
import torch

from tests import straight_line
from vovnet_fast import VoVNet, checkpoints, specs
from vovnet_fast.checkpoints import CheckpointError, convert, identify, load
from vovnet_fast.compat import zip

TWINS = {"V-39": "vovnet39a", "V-57": "vovnet57a"}


def hub_file(name):
    """As torch.hub's code writes it, of a network in which every value counts."""
    with torch.device("meta"):
        net_class, numbers = straight_line.BUILDERS[name]
        state = net_class(*numbers).state_dict()
    return {key: torch.zeros(value.shape) for key, value in state.items()}


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("name", "prefix"), [("V-27-slim", "backbone."), ("V-39", ""), ("V-57", "module.")]
)
@pytest.mark.usefixtures("no_warnings")
def test_torch_hub_files_are_recognised(name, prefix):
    state = {prefix + key: value for key, value in hub_file(name).items()}
    assert identify(state) == [name]
    report = load(VoVNet(name), {"state_dict": state})
    assert (report.layout, report.prefix) == ("torchhub", prefix)
    assert report.ignored == (f"{prefix}classifier.weight", f"{prefix}classifier.bias")


@pytest.mark.parametrize(("name", "twin"), [("V-39", "vovnet39a")])
def test_a_classifier_tells_torch_hub_from_timm(name, twin):
    """The keys and the shapes of the backbones are the same, the functions are not."""
    hub = hub_file(name)
    model = VoVNet(twin)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{twin} cannot load a torchhub .*identity.*{name}"):
        load(model, hub)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=f"torchhub checkpoint cannot be read as {twin}"):
        convert(hub, twin)
    headless = {k: v for k, v in hub.items() if not k.startswith("classifier")}
    with pytest.raises(CheckpointError, match=f"{twin} cannot load a torchhub checkpoint"):
        load(model, headless, layout="torchhub")
    # timm's own keys, and native ones with timm's classifier.
    timm = convert(headless, twin, "timm", layout="native")
    with pytest.raises(CheckpointError, match=f"{name} cannot load a timm checkpoint"):
        load(VoVNet(name), timm)
    ours = {**headless, "head.fc.weight": torch.zeros(2, 2)}
    assert identify(ours) == [twin]
    with pytest.raises(CheckpointError, match=f"{name} cannot load a timm checkpoint"):
        load(VoVNet(name), ours)


@pytest.mark.parametrize("name", ["V-39", "vovnet57a"])
def test_where_nothing_tells_it_is_said(name):
    other = {**TWINS, **{b: a for a, b in TWINS.items()}}[name]
    with torch.device("meta"):
        state = VoVNet(name).state_dict()
    state = {f"backbone.{k}": torch.zeros(v.shape) for k, v in state.items()}
    assert set(identify(state)) == {name, other}
    model = VoVNet(name)
    with pytest.warns(UserWarning, match=rf"tells {name} \(.*from {other} \(.*layout='native'"):
        load(model, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model, state, layout="native")
        if specs.get(name).dialect == "torchhub":
            load(model, state, layout="torchhub")
        # What has eSE, and what is alone with its parameters, is not asked about.
        for alone in ("V-39-eSE", "V-27-slim"):
            with torch.device("meta"):
                states = VoVNet(alone).state_dict()
            convert({k: torch.zeros(v.shape) for k, v in states.items()}, alone)


def test_a_layout_that_is_given_is_a_promise():
    """Of detectron2 too: what its code runs is not what timm's does, under the same keys."""
    with torch.device("meta"):
        state = VoVNet("vovnet39a").state_dict()
    state = {k: torch.zeros(v.shape) for k, v in state.items()}
    with pytest.raises(CheckpointError, match=r"cannot load a detectron2 checkpoint.*no eSE gate"):
        load(VoVNet("vovnet39a"), state, layout="detectron2")
    with pytest.raises(CheckpointError, match=r"no VoVNet backbone found.*'features\.init_block"):
        load(VoVNet("V-39"), state, layout="pytorchcv")


@pytest.mark.parametrize("name", ["V-27-slim", "V-39"])
@pytest.mark.usefixtures("no_warnings")
def test_both_ways_to_pytorchcv(name):
    native = {k: torch.zeros(v.shape) for k, v in VoVNet(name).state_dict().items()}
    theirs = convert(native, name, "pytorchcv", layout="native", add_prefix="module.")
    assert "module.features.stage4.unit1.concat_conv.bn.running_var" in theirs
    assert identify(theirs) == [name]
    back, report = checkpoints.convert_with_report(theirs, name, "torchhub")
    assert (report.layout, report.prefix) == ("pytorchcv", "module.")
    assert list(back) == list(native)
    with pytest.raises(CheckpointError, match=r"1 keys without a place: features\.stage9"):
        load(
            VoVNet(name), {**convert(theirs, name, "pytorchcv"), "features.stage9.x": torch.ones(1)}
        )


@pytest.mark.versions
@pytest.mark.parametrize(
    ("name", "theirs"), [("V-27-slim", "vovnet27s"), ("V-39", "vovnet39"), ("V-57", "vovnet57")]
)
def test_the_function_is_pytorchcvs(name, theirs):
    """Its own modules, in fp64 and with every norm and bias at work: not one bit differs."""
    module = pytest.importorskip(
        "pytorchcv.models.vovnet", reason="pytorchcv is not installed: pip install pytorchcv"
    )
    torch.manual_seed(0)
    net = straight_line.randomise(getattr(module, theirs)()).double().eval()
    features = OrderedDict()
    for number in range(1, 5):
        getattr(net.features, f"stage{number}").register_forward_hook(
            lambda _, __, out, number=number: features.__setitem__(number, out)
        )
    model = VoVNet(name).double().eval()
    assert load(model, net.state_dict()).layout == "pytorchcv"
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)  # It pools 7x7.
    with torch.no_grad():
        logits, ours = net(x), model(x)
    for a, b in zip(ours, features.values(), strict=True):
        assert torch.equal(a, b)
    assert logits.std() > 0
    # And back, into modules of its own.
    again = getattr(module, theirs)().double().eval()
    state = convert(model.state_dict(), name, "pytorchcv", layout="native")
    kept = {k: v for k, v in net.state_dict().items() if k.startswith("output")}
    again.load_state_dict({**state, **kept})
    with torch.no_grad():
        assert torch.equal(again(x), logits)
