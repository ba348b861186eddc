"""A frozen network that was written to a file and read again is the same network."""

import copy
import io
import json
import os
import pickle
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vovnet_fast
from tests import straight_line
from tests.checkpoints.test_writing import largest_file
from tests.features import needs_half
from tests.fused import fused
from tests.tiny import TINY
from vovnet_fast import VoVNet, checkpoints, freeze, load_frozen, specs, use_backend
from vovnet_fast.backends import _extension
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.compat import zip
from vovnet_fast.deploy import file as frozen_file
from vovnet_fast.deploy import layout

needs_extension = pytest.mark.skipif(
    _extension.why_not("cpu") is not None, reason="the extension's CPU half is not built"
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
NARROW = [torch.float32, torch.bfloat16]
CASES = [
    *(("reference", dtype) for dtype in (*NARROW, torch.float64)),
    *(pytest.param("cpu", dtype, marks=needs_extension) for dtype in (*NARROW, torch.float16)),
    pytest.param("reference", torch.float16, marks=needs_half),
]


def frozen_of(spec="detectron2", dtype=None, **options):
    torch.manual_seed(0)
    model = straight_line.randomise(VoVNet(TINY.get(spec, spec), **options))
    return freeze(model, dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.safetensors"


def assert_same(found, wanted):
    assert [y.dtype for y in found] == [y.dtype for y in wanted]
    assert [y.stride() for y in found] == [y.stride() for y in wanted]
    assert all(map(torch.equal, found, wanted))


# --------------------------------------------------------------------------------------
# What is read is what was written
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("spec", TINY)
def test_features_are_the_same_bit_for_bit(spec, backend, dtype, path):
    """On Triton too: ``tests/kernels/test_freeze.py``."""
    frozen = frozen_of(spec, dtype)
    frozen.save(path)
    loaded = load_frozen(path)
    x = torch.randn(2, 3, 39, 46, dtype=dtype)
    with use_backend(backend):
        for _ in range(4):  # Calls are recorded at the third.
            assert_same(loaded(x), frozen(x))


@pytest.mark.parametrize(
    "name", ["V-19-slim-dw-eSE", "ese_vovnet19b_slim_dw", "vovnet-19-slim-dw1"]
)
def test_published_ones(name, path):
    frozen = frozen_of(name, torch.bfloat16)
    frozen.save(path)
    loaded, x = load_frozen(path), torch.randn(1, 3, 64, 64)
    assert loaded.spec == specs.get(name)
    assert_same(loaded(x), frozen(x))


def test_on_the_fused_path(path):
    frozen = frozen_of("depthwise")
    frozen.save(path)
    x = torch.randn(1, 3, 48, 40)
    with fused():
        assert_same(load_frozen(path)(x), frozen(x))


def test_all_that_it_was_frozen_with(path):
    torch.manual_seed(0)
    model = VoVNet(TINY["timm"], input_ch=5, out_features=("stem_2", "stage4"))
    options = dict(memory_format=torch.contiguous_format, out_dtype=torch.float32)
    frozen = freeze(model, torch.bfloat16, **options)
    frozen.save(path)
    loaded, x = load_frozen(path), torch.randn(1, 5, 48, 40)
    for name in (
        "spec", "out_features", "feature_channels", "feature_strides", "dtype", "out_dtype",
        "memory_format", "graph",
    ):  # fmt: skip
        assert getattr(loaded, name) == getattr(frozen, name), name
    assert loaded.state_dict().keys() == frozen.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), frozen.state_dict().values()))
    assert_same(loaded(x), frozen(x))
    other = load_frozen(
        path, "cpu", memory_format=torch.channels_last, graph=True, out_dtype=torch.bfloat16
    )
    assert (other.memory_format, other.graph) == (torch.channels_last, True)
    assert other.out_dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"or freeze, or load, with graph=False"):
        other(x)
    with pytest.raises(ValueError, match="memory_format must be"):
        load_frozen(path, memory_format=torch.preserve_format)
    with pytest.raises(TypeError, match="out_dtype must be"):
        load_frozen(path, out_dtype=torch.int8)


def test_the_header_can_be_read_by_anybody(path):
    frozen = frozen_of("seed", torch.float16)
    frozen.save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vovnet_fast.frozen"])
        assert file.metadata()["format"] == "pt"  # Whose tensors they are, for other readers.
    assert header == {
        "format": 1,
        "version": vovnet_fast.__version__,
        "spec": frozen.spec.encode(),
        "dialect": "seed",
        "dtype": "float16",
        "out_features": ["stage2", "stage3", "stage4", "stage5"],
        "out_dtype": "float16",
        "memory_format": "channels_last",
        "graph": False,
    }


@needs_extension
def test_nothing_that_was_packed_is_in_the_file(path):
    """The file of a network that has run is that of one that has not."""
    frozen = frozen_of()
    frozen.save(path)
    before = path.read_bytes()
    with use_backend("cpu"):
        frozen(torch.randn(1, 3, 40, 40))
    frozen.save(path)
    assert path.read_bytes() == before
    buffers = sum(v.nbytes for v in load_file(path).values())
    assert buffers < path.stat().st_size < buffers + 8192


# --------------------------------------------------------------------------------------
# What a loaded network is
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_follows_its_own_buffers_and_not_the_file(backend, path):
    frozen = frozen_of()
    frozen.save(path)
    before = path.read_bytes()
    loaded, x = load_frozen(path), torch.randn(1, 3, 48, 40)
    with use_backend(backend):
        first = [loaded(x) for _ in range(4)][-1]
        for network in (loaded, frozen):
            network.weight_3.mul_(2)
        changed = frozen(x)
        assert not torch.equal(changed[-1], first[-1])
        assert_same(loaded(x), changed)
        assert path.read_bytes() == before
        loaded.weight_3.data.mul_(0.5)
        loaded.refresh()  # Packs anew, and reads nothing anew.
        assert_same(loaded(x), first)
        loaded.load_state_dict(frozen.state_dict())
        assert_same(loaded(x), changed)
        loaded.scale.add_(1)
        with pytest.raises(ValueError, match="buffer scale must be 1 throughout"):
            loaded(x)


def test_the_file_may_go_and_another_may_come(path):
    frozen = frozen_of()
    frozen.save(path)
    loaded, x = load_frozen(path), torch.randn(1, 3, 48, 40)
    loaded.weight_0.mul_(2)
    loaded.save(path)  # In place of the file that it is a window on.
    again = load_frozen(path)
    path.unlink()
    assert_same(again(x), loaded(x))
    assert torch.equal(again.weight_0, 2 * frozen.weight_0)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux says what is mapped")
def test_buffers_are_windows_on_the_file(path):
    """All but those that lie askew there, which are copied: the last bits would differ."""
    frozen_of("V-19-slim-dw-eSE").save(path)
    loaded = load_frozen(path)
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    windows = 0
    for name in frozen_file._written(loaded):
        address = getattr(loaded, name).data_ptr()
        assert address % 64 == 0, name
        if any(int(low, 16) <= address < int(high, 16) for low, high in spans):
            windows += getattr(loaded, name).nbytes
    assert windows > 0.99 * path.stat().st_size


def test_copies_pickles_and_shared_memory(path):
    """Have the values, and nothing else of the file."""
    frozen = frozen_of()
    frozen.save(path)
    loaded, x = load_frozen(path), torch.randn(1, 3, 48, 40)
    expected = frozen(x)
    assert len(pickle.dumps(loaded)) < 1.1 * len(pickle.dumps(frozen))
    streams = io.BytesIO(), io.BytesIO()
    for network, stream in zip((loaded, frozen), streams, strict=True):
        torch.save(network.state_dict(), stream)
    assert len(streams[0].getvalue()) == len(streams[1].getvalue())
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), loaded.share_memory()):
        assert_same(twin(x), expected)
    checkpoints.write(loaded.state_dict(), path.with_name("weights.pth"))


def test_whatever_the_default_device_is_and_the_mode(path):
    frozen = frozen_of()
    with torch.device("meta"):
        frozen.save(path)
        loaded = load_frozen(path)
    x = torch.randn(1, 3, 48, 40)
    assert_same(loaded(x), frozen(x))
    with torch.inference_mode():
        loaded = load_frozen(path)
    assert not any(buffer.is_inference() for buffer in loaded.buffers())
    loaded.weight_0.mul_(1)


@pytest.mark.parametrize("name", ["V-57-eSE", "ese_vovnet19b_dw", "vovnet39a", "vovnet-39"])
def test_what_an_architecture_has_is_what_freeze_gives_it(name):
    """The buffers are written down a second time, for files."""
    with torch.device("meta"):
        frozen = freeze(VoVNet(name, input_ch=4), torch.float16)
    found = layout.expected(frozen.spec, 4, torch.float16)
    assert found == {name: frozen._layout[name] for name in frozen_file._written(frozen)}


def test_random_numbers_are_not_drawn(path):
    frozen_of().save(path)
    before = torch.get_rng_state()
    load_frozen(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_imports_no_compiler(path):
    """Which takes seconds, and comes with torch's normal_ on the meta device."""
    frozen_of().save(path)
    code = (
        "import sys, vovnet_fast; before = set(sys.modules); "
        "vovnet_fast.load_frozen(sys.argv[1]); print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert "vovnet_fast.deploy.file" in found
    assert not [name for name in found if name.startswith(("torch._dynamo", "torch._inductor"))]


# --------------------------------------------------------------------------------------
# Bad files
# --------------------------------------------------------------------------------------


@pytest.fixture
def parts(path):
    """A good file's tensors and metadata, and what writes them with changes."""
    frozen_of().save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()

    def write(change_tensors=None, **changes):
        fields = json.loads(metadata["vovnet_fast.frozen"])
        fields.update(changes)
        fields = {k: v for k, v in fields.items() if v is not None}
        changed = {k: v for k, v in {**tensors, **(change_tensors or {})}.items() if v is not None}
        save_file(changed, path, {**metadata, "vovnet_fast.frozen": json.dumps(fields)})

    return tensors, write


def spec(**changes):
    return replace(TINY["detectron2"], **changes).encode()


def newer_spec():
    return json.dumps({**json.loads(spec()), "attention": True})


HEADERS = {
    "a newer format": (
        dict(format=2, version="9.1"),
        r"was written by vovnet_fast 9\.1 and has format 2, where this one, .* knows 1: install "
        r"vovnet_fast 9\.1, or make the frozen network again",
    ),
    "a format before all": (dict(format=0), "has format 0, where this one"),
    "a format that is no number": (dict(format="1"), "it has no number of a format"),
    "no format": (dict(format=None), "it has no number of a format"),
    "an architecture of a newer version": (
        dict(spec=newer_spec(), version="9.1"),
        r"written by vovnet_fast 9\.1 and has an architecture .*attention.*install vovnet_fast 9",
    ),
    "no architecture": (dict(spec=newer_spec()), "header of .*: its architecture is none"),
    "an architecture that is no JSON": (dict(spec="V-39"), "its architecture is none"),
    "a number for an architecture": (dict(spec="3"), "its architecture is none"),
    "an architecture that nobody can build": (
        dict(spec=spec(layers_per_block=10**9)),
        "does not hold tiny-detectron2 in float32, as its header says: there are 34 tensors",
    ),
    "widths that overflow": (
        dict(spec=spec(mid_channels=(10**12,) * 4, out_channels=(10**12,) * 4)),
        "tensors that differ: ",
    ),
    "another dialect": (dict(dialect="timm"), "its dialect is timm, its architecture's detectron2"),
    "another dtype": (dict(dtype="int8"), "'int8' where one of float16, bfloat16"),
    "a dtype of the features": (dict(out_dtype="x"), "'x' where one of float16, bfloat16"),
    "a layout": (dict(memory_format="x"), "'x' where one of channels_last"),
    "features": (dict(out_features=["stage6"]), r"its features are \['stage6'\], and one or more"),
    "features that are no names": (dict(out_features=[None]), r"its features are \[None\]"),
    "an empty list": (dict(out_features=[]), r"its features are \[\], and one or more of"),
    "another order": (dict(out_features=["stage3", "stage2"]), "were expected, in this order"),
    "no features": (dict(out_features=None), "other fields than format, version, spec"),
    "a field too many": (dict(more=1), "other fields than format, version, spec"),
    "a field of another type": (dict(graph="no"), "other fields than format, version, spec"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_bad_headers(kind, path, parts):
    _, write = parts
    changes, message = HEADERS[kind]
    write(**changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_frozen(path)
    assert str(path) in str(raised.value)


TENSORS = {
    "one is missing": (lambda t: {"weight_3": None}, "1 tensors missing: weight_3"),
    "the first is missing": (lambda t: {"weight_0": None}, "does not hold tiny-detectron2"),
    "the first has another rank": (
        lambda t: {"weight_0": torch.ones(3)},
        r"of which weight_0 is \[3\]: more",
    ),
    "one is too many": (lambda t: {"x": torch.ones(1)}, "1 tensors without a place: x"),
    "a shape": (
        lambda t: {"weight_3": t["weight_3"][:1].clone()},
        r"1 tensors that differ: weight_3 is \[1, 3, 3, 16\] in torch.float32, expected \[8, 3, 3",
    ),
    "a dtype": (
        lambda t: {"fc_0": t["fc_0"].half()},
        "1 tensors that differ: fc_0 is .* in torch.float16, expected .* in torch.float32",
    ),
    "nan": (
        lambda t: {"shift": t["shift"].clone().index_fill(0, torch.tensor([3]), torch.nan)},
        "cannot load .*: 1 of its tensors hold NaN or Inf, first shift",
    ),
    "inf": (lambda t: {"weight_1": t["weight_1"] / 0}, "NaN or Inf, first weight_1"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_bad_tensors(kind, path, parts):
    tensors, write = parts
    change, message = TENSORS[kind]
    write(change(tensors))
    with pytest.raises(CheckpointError, match=message) as raised:
        load_frozen(path)
    assert str(path) in str(raised.value)


def test_other_files(path, parts, tmp_path):
    save_file({"weight_0": torch.ones(1)}, path)
    with pytest.raises(
        CheckpointError, match=r"holds tensors and no frozen network.*_fast\.freeze"
    ):
        load_frozen(path)
    checkpoints.write(VoVNet(TINY["timm"]).state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.pth: .*safetensors file was"):
        load_frozen(tmp_path / "model.pth")
    for text in ("", "[]", "{", "[" * 100_000, "null"):
        save_file({"weight_0": torch.ones(1)}, path, {"vovnet_fast.frozen": text})
        with pytest.raises(CheckpointError, match="cannot read the header of"):
            load_frozen(path)
    with pytest.raises(FileNotFoundError, match=r"no frozen network at .*gone"):
        load_frozen(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="it is no file"):
        load_frozen(tmp_path)


def test_cut_anywhere(path):
    frozen_of().save(path)
    whole = path.read_bytes()
    for share in (0, 0.00005, 0.001, 0.3, 0.9, 0.99999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match=r"cannot read .*network"):
            load_frozen(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match=r"cannot read .*network"):
        load_frozen(path)


# --------------------------------------------------------------------------------------
# What is not written
# --------------------------------------------------------------------------------------


def test_what_could_not_be_read_again_is_not_written(path):
    frozen = frozen_of()
    path.write_text("old")
    with pytest.raises(ValueError, match=r"name must end in \.safetensors, got '.*\.pth'"):
        frozen.save(path.with_suffix(".pth"))
    good = frozen.weight_3
    for wrong in (good[:1], good.double()):
        frozen.weight_3 = wrong
        with pytest.raises(ValueError, match="the buffer weight_3 must be"):
            frozen.save(path)
    frozen.weight_3 = good / 0
    with pytest.raises(CheckpointError, match=r"cannot save .* NaN or Inf, first weight_3"):
        frozen.save(path)
    frozen.weight_3 = good
    with pytest.raises(CheckpointError, match="on the meta device, where weight_0 has no values"):
        copy.deepcopy(frozen).to("meta").save(path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        frozen.save(path.parent / "no" / path.name)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("room", [0, 1000, 30_000])
def test_a_full_disk(path, room):
    frozen = frozen_of()
    path.write_text("old")
    with largest_file(room), pytest.raises(OSError, match=r"cannot write: .* as it was"):
        frozen.save(path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_private_file_stays_private(path):
    path.write_text("old")
    path.chmod(0o600)
    frozen_of().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    load_frozen(path)
