import collections
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, checkpoints, specs
from vovnet_fast.checkpoints import CheckpointError, convert, identify, load
from vovnet_fast.compat import zip

PREFIXES = ["", "module.", "backbone.", "img_backbone.", "backbone.bottom_up.", "module.backbone."]


def features(network, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        return network(torch.randn(1, 3, 32, 40))


def assert_same_function(model, net):
    for ours, theirs in zip(features(model), features(net), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize(
    "name", ["V-19-slim-eSE", "ese_vovnet19b_slim_dw", "vovnet-19-slim-dw1", "V-27-slim"]
)
def test_loads_every_layout_prefix_and_wrapper(name, prefix, wrapper):
    net = straight_line.build(name)
    source = {prefix + k: v for k, v in net.state_dict().items()}
    source["neck.lateral_convs.0.conv.weight"] = torch.zeros(2, 2)
    if wrapper:
        source = {wrapper: source, "meta": {"epoch": 12}}
    model = VoVNet(name).eval()
    report = load(model, source)
    assert_same_function(model, net)
    dialect = model.spec.dialect
    assert report.layout == ("native" if dialect == "detectron2" else dialect)
    assert report.prefix == prefix + ("model." if dialect == "seed" else "")
    assert report.tensors == len(model.state_dict())
    assert report.parameters == sum(
        v.numel() for k, v in model.state_dict().items() if "num_batches" not in k
    )
    heads = {"seed": 7, "timm": 2, "detectron2": 0, "torchhub": 2}[dialect]
    assert len(report.ignored) == 1 + heads


@pytest.mark.parametrize("name", straight_line.BUILDERS)
def test_keys_of_every_architecture(name):
    """The foreign keys that are written are exactly the original's, and come back."""
    net_class, numbers = straight_line.BUILDERS[name]
    with torch.device("meta"):
        theirs = net_class(*numbers).state_dict()
    theirs = {k: torch.zeros(v.shape) for k, v in theirs.items()}
    dialect = specs.get(name).dialect
    native = convert(theirs, name)
    assert list(native) == list(VoVNet(name).state_dict())
    back = convert(native, name, dialect, layout="native")
    heads = dict(seed="model.classifier.", timm="head.", torchhub="classifier.")
    heads = heads.get(dialect, "-")
    assert set(back) == {k for k in theirs if not k.startswith(heads)}
    assert all(back[k].shape == theirs[k].shape for k in back)
    assert identify(theirs)[0] == name


@pytest.mark.parametrize("name", ["V-19-slim-eSE", "V-19-slim-dw-eSE"])
def test_detectron2_and_timm_where_they_agree(name):
    """Both ways, and the result computes the same in the other's own network."""
    twin = {"V-19-slim-eSE": "ese_vovnet19b_slim", "V-19-slim-dw-eSE": "ese_vovnet19b_slim_dw"}
    net = straight_line.build(name)
    other = straight_line.build(twin[name], seed=1)
    as_timm = convert(net.state_dict(), name, "timm")
    other.load_state_dict(as_timm, strict=False)
    for a, b in zip(features(other), features(net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max())
    returned = convert(as_timm, name, "detectron2")
    assert all(torch.equal(returned[k], v) for k, v in net.state_dict().items())
    assert set(identify(as_timm)) == {name, twin[name]}


@pytest.mark.parametrize(
    ("name", "to", "reason"),
    [
        ("V-39-eSE", "timm", "OSA4_1 has an eSE gate in V-39-eSE, timm has none"),
        ("V-99-eSE", "timm", "ese_vovnet99b"),
        ("ese_vovnet39b", "detectron2", "OSA4_1 has no eSE gate in ese_vovnet39b"),
        ("vovnet39a", "detectron2", "OSA2_1 has no eSE gate"),
        ("vovnet57a", "torchhub", "OSA4_2 has no identity add in vovnet57a, torchhub has one"),
        ("vovnet57a", "pytorchcv", "torchhub dialect's own architecture: V-27-slim, V-39, V-57"),
        ("V-39", "timm", "OSA4_2 has an identity add in V-39, timm has none"),
        ("V-39-eSE", "pytorchcv", "OSA2_1 has an eSE gate in V-39-eSE, torchhub has none"),
        ("vovnet-39", "detectron2", "stem strides"),
        ("V-39-eSE", "seed", "max pool mode|stem strides"),
        ("ese_vovnet39b", "seed", "do not compute the same function"),
    ],
)
def test_conversions_without_a_function_are_refused(name, to, reason):
    model = VoVNet(name)
    with pytest.raises(CheckpointError, match=reason):
        convert(model.state_dict(), name, to, layout="native")


def test_foreign_checkpoints_of_another_function_are_refused():
    timm = straight_line.build("ese_vovnet39b").state_dict()
    with pytest.raises(CheckpointError, match=r"V-39-eSE cannot load a timm .*OSA4_1 has an eSE"):
        load(VoVNet("V-39-eSE"), timm)
    with pytest.raises(CheckpointError, match="cannot be read as V-39-eSE"):
        convert(timm, "V-39-eSE", "detectron2")
    seed = straight_line.build("vovnet-19-slim").state_dict()
    with pytest.raises(CheckpointError, match=r"eSE gate: hard_sigmoid in V-19-slim-eSE, sigmoid"):
        load(VoVNet("V-19-slim-eSE"), seed)


def filled(spec_name, **options):
    return straight_line.randomise(VoVNet(spec_name, **options)).state_dict()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda sd: sd.pop("stage5.OSA5_2.ese.fc.bias"),
            r"1 parameters left unfilled: stage5\.OSA5_2\.ese\.fc\.bias",
        ),
        (
            lambda sd: [sd.pop(k) for k in list(sd) if "running_var" in k],
            r"\d+ parameters left unfilled: stem\.stem_1/norm\.running_var, .*, \.\.\.",
        ),
        (
            lambda sd: sd.update({"stage3.OSA3_9.ese.fc.bias": torch.zeros(3)}),
            r"1 keys without a place: stage3\.OSA3_9\.ese\.fc\.bias",
        ),
        (
            lambda sd: sd.update({"stage2.OSA2_1.ese.fc.bias": torch.zeros(3)}),
            r"1 shapes differ: stage2\.OSA2_1\.ese\.fc\.bias is \[3\], expected \[16\]",
        ),
        (
            lambda sd: sd["stage2.OSA2_1.ese.fc.bias"][1].fill_(float("nan")),
            r"1 tensors of the checkpoint hold NaN or Inf, first stage2\.OSA2_1",
        ),
        (
            lambda sd: sd.update({"stage2.OSA2_1.ese.fc.bias": [1, 2]}),
            r"'stage2\.OSA2_1\.ese\.fc\.bias' is no tensor but list",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(damage, message):
    model = VoVNet(TINY["detectron2"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = {k: v.clone() for k, v in filled(TINY["detectron2"]).items()}
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        load(model, source)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_deeper_network_is_no_prefix_of_a_shallow_one():
    """Every parameter of V-57 is in a V-99 file; loading it would be wrong all the same."""
    with torch.device("meta"):
        deep = VoVNet("V-99-eSE").state_dict()
    deep = {k: torch.zeros(v.shape) for k, v in deep.items()}
    with pytest.raises(CheckpointError, match=r"keys without a place.*It fits V-99-eSE"):
        load(VoVNet("V-57-eSE"), deep)


def test_other_input_channels():
    state = filled("V-19-slim-eSE", input_ch=6)
    assert identify(state)[0] == "V-19-slim-eSE"
    assert convert(state, "V-19-slim-eSE", "timm")["stem.0.conv.weight"].shape[1] == 6
    with pytest.raises(CheckpointError, match=r"stem_1/conv\.weight is \[64, 6, 3, 3\]"):
        load(VoVNet("V-19-slim-eSE"), state)


def test_counters_and_other_norms():
    """Files of frozen norms have no counters; models of frozen norms take none."""
    state = filled(TINY["timm"])
    without = {k: v for k, v in state.items() if "num_batches" not in k}
    model = VoVNet(TINY["timm"])
    load(model, without)
    assert model.state_dict()["stem.stem_1/norm.num_batches_tracked"] == 0
    frozen = VoVNet(TINY["timm"], norm_cfg=dict(type="FrozenBN"))
    load(frozen, state)
    assert all(torch.equal(v, state[k]) for k, v in frozen.state_dict().items())
    group = VoVNet(TINY["timm"], norm_cfg=dict(type="GN", num_groups=4))
    load(group, {k: v * 2 for k, v in group.state_dict().items()})
    with pytest.raises(CheckpointError, match=r"keys without a place.*running_mean"):
        load(group, state)


def test_two_backbones_need_a_choice():
    state = filled(TINY["detectron2"])
    both = {f"teacher.{k}": v for k, v in state.items()}
    both |= {f"student.{k}": v * 0 + 1 for k, v in state.items()}
    model = VoVNet(TINY["detectron2"])
    with pytest.raises(CheckpointError, match=r"more than one.*'teacher\.'.*'student\.'"):
        load(model, both)
    assert load(model, both, prefix="student").prefix == "student."
    assert all((p == 1).all() for p in model.parameters())
    with pytest.raises(CheckpointError, match=r"under the prefix 'pupil'"):
        load(model, both, prefix="pupil")


def test_no_backbone():
    with pytest.raises(CheckpointError, match=r"no VoVNet backbone found.*'layer1\.0\.conv1"):
        load(VoVNet(TINY["seed"]), {"layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds nothing"):
        load(VoVNet(TINY["seed"]), {})
    with pytest.raises(CheckpointError, match="mapping of tensors"):
        checkpoints.files.unwrap([1, 2])
    with pytest.raises(TypeError, match=r"must be a vovnet_fast\.VoVNet, got Linear"):
        load(torch.nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match=r"to must be one of native, .* got 'keras'"):
        convert({}, "V-19-eSE", "keras")


# --------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_file_round_trip(tmp_path, ending):
    state = filled(TINY["detectron2"])
    path = tmp_path / f"weights{ending}"
    checkpoints.write(state, path)
    model = VoVNet(TINY["detectron2"])
    load(model, path)
    load(model, str(path))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_files_of_before_torch_1_6(tmp_path):
    state = filled(TINY["detectron2"])
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load(VoVNet(TINY["detectron2"]), tmp_path / "old.pth")


class LogBuffer:
    """What a trainer puts beside the weights."""

    def __init__(self):
        self.history = [1.0]


class Evil:
    ran = False

    def __reduce__(self):
        return (_mark, ())


def _mark():
    Evil.ran = True


class VeryEvil:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.versions
def test_trainers_files_load_without_running_anything(tmp_path):
    path = tmp_path / "epoch_12.pth"
    state = filled(TINY["detectron2"])
    beside = dict(buffer=LogBuffer(), counts=collections.defaultdict(int), evil=Evil())
    torch.save(dict(state_dict=state, message_hub=beside), path)
    load(VoVNet(TINY["detectron2"]), path)
    assert not Evil.ran
    torch.save(dict(state_dict=state, hook=VeryEvil()), path)
    with pytest.raises(CheckpointError, match=r"system, for which weights have no use"):
        load(VoVNet(TINY["detectron2"]), path)


def test_damaged_and_absent_files(tmp_path):
    model = VoVNet(TINY["detectron2"])
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(model, tmp_path / "none.pth")
    checkpoints.write(filled(TINY["detectron2"]), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "text.safetensors").write_text("404 Not Found")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("cut.pth", "text.safetensors"):
        with pytest.raises(CheckpointError, match=f"cannot read .*{name}"):
            load(model, tmp_path / name)
    with pytest.raises(CheckpointError):
        load(model, tmp_path / "raw.pkl")
    with pytest.raises(CheckpointError, match="only files and http"):
        load(model, "torchvision://resnet50")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_text("old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(filled(TINY["detectron2"]), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights.pth"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        checkpoints.write({}, tmp_path / "missing" / "weights.pth")


def test_addresses_are_downloaded_once(tmp_path, monkeypatch):
    """Over a real http server on this machine."""
    import http.server
    import threading

    served = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "site")

        def log_message(self, *args):
            served.append(self.path)

    (tmp_path / "site").mkdir()
    checkpoints.write(filled(TINY["detectron2"]), tmp_path / "site" / "v.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for _ in range(2):
            url = f"http://127.0.0.1:{server.server_port}/v.pth?raw=1"
            load(VoVNet(TINY["detectron2"]), url)
    finally:
        server.shutdown()
    assert len(served) == 1


def test_safetensors_of_views(tmp_path):
    """Tensors of a converted checkpoint may share memory or lie strided."""
    state = filled(TINY["detectron2"])
    state = {
        k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()
    }
    checkpoints.write(state, tmp_path / "a.safetensors")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "b.safetensors")
    a, b = (checkpoints.read(tmp_path / f"{n}.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in b)
