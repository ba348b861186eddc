"""Figures of docs/performance.md are what the code counts; two processes are as good as one."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from tests.fused import fused
from tests.network.test_training import images, network
from tests.processes import run_two

communication = pytest.importorskip("benchmarks.communication")

DOCS = Path(__file__).parents[2] / "docs"
WRITTEN = json.loads((DOCS / "performance.json").read_text())
DOCUMENT = " ".join((DOCS / "performance.md").read_text().split())
COUNTS = json.loads((DOCS / "counts.json").read_text())["counts"]


def row(section, **content):
    [found] = [r for r in WRITTEN[section] if content.items() <= r.items()]
    return found


# --------------------------------------------------------------------------------------
# The document
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [name for name in WRITTEN if name != "compile seconds"])
def test_sections_are_what_is_counted(section):
    pytest.importorskip("triton", minversion="3.6", reason="launches are planned with Triton")
    from benchmarks import scaling

    assert scaling.SECTIONS[section]() == WRITTEN[section], scaling.UPDATE


def test_tables_are_those_of_the_file():
    from benchmarks import scaling_tables

    document = (DOCS / "performance.md").read_text()
    assert scaling_tables.filled(document, WRITTEN) == document, (
        "python -m benchmarks.scaling --update"
    )
    with pytest.raises(ValueError, match="no place for floors"):
        scaling_tables.filled("", WRITTEN)


def test_every_section_has_a_table():
    pytest.importorskip("triton", minversion="3.6", reason="launches are planned with Triton")
    from benchmarks import scaling, scaling_tables

    assert set(scaling_tables.TABLES) == set(scaling.SECTIONS) == set(WRITTEN) - {"compile seconds"}


def test_figures_in_the_text():
    conv = row("convolutions", layer="3x3 128>128, 200x336")
    assert f"At {conv['tile']} that is {conv['FLOP a byte']} FLOP a byte" in DOCUMENT
    assert f"the floor asks for {conv['L2 TB/s']} TB/s from L2" in DOCUMENT
    assert f"128>128 makes {conv['programs']} programs of {conv['tile']}, one on" in DOCUMENT
    assert f"a processor: {conv['programs'] / 132:.2f} waves" in DOCUMENT
    small = row("convolutions", layer="3x3 224>224, 25x42")
    assert f"(25x42): {small['programs']} programs for 132 processors" in DOCUMENT
    sm_90, sm_80 = COUNTS["kernels for sm_90"], COUNTS["kernels for sm_80"]
    layer = "conv, 128>128 3x3/1 float16"
    tile = sm_90[f"{layer}, tma-256x128-k64-w8-s3"]
    assert f"takes {tile['registers']} in all" in DOCUMENT
    wide = sm_90["conv, 192>192 3x3/1 float16, tma-256x128+64-k64-w8-s3"]
    assert f"with 128+64 channels it takes {wide['registers']}" in DOCUMENT
    persistent = sm_90[f"{layer}, tma-256x128-k64-w8-s3-p"]
    assert f"for {persistent['registers']} registers" in DOCUMENT
    assert f"Three stages of 256x128x64 are {tile['shared bytes'] // 1000} KB of 227" in DOCUMENT
    old = sm_80[f"{layer}, pointer-128x128-k64-w8-s3"]
    assert f"Of {old['loop instructions']} instructions in a round of its loop" in DOCUMENT
    assert f"{old['HMMA']} are products" in DOCUMENT
    assert f"the round has {tile['loop instructions']} (256x128x64)" in DOCUMENT


# --------------------------------------------------------------------------------------
# Communication on paper
# --------------------------------------------------------------------------------------

LINK = communication.Link("test", rate=1e9, share=0.5, latency=1e-3, small=2e-3)


def test_all_reduce():
    """Each of four GPUs passes on three quarters of the bytes, twice, in six steps."""
    seconds = communication.all_reduce_seconds(1_000_000, 4, LINK)
    assert seconds == pytest.approx(2 * 0.75 * 1e6 / 0.5e9 + 6e-3)


def test_buckets():
    gradients = [communication.Gradient(size, t) for t, size in enumerate((3, 8, 20, 10, 2))]
    found = communication.buckets(gradients, first=10, others=25)
    assert found == [(11, 1), (30, 3), (2, 4)]
    assert communication.buckets([]) == []


def test_what_is_not_hidden():
    """The second sum waits for the first; the last ends after the backward pass."""
    each = communication.all_reduce_seconds(1000, 2, LINK)
    sent = [communication.Gradient(1000, 0.0), communication.Gradient(1000, each / 2)]
    exposed = communication.exposed_seconds
    assert exposed(sent, each, 2, LINK) == pytest.approx(each)
    assert exposed(sent, 2 * each, 2, LINK) == 0
    assert exposed(sent, each, 1, LINK) == 0
    late = [communication.Gradient(1000, 5.0)]
    assert exposed(late, 5.0, 2, LINK) == pytest.approx(each)


def test_nodes():
    assert communication.link(8) is communication.NVLINK
    assert communication.link(16) is communication.INFINIBAND
    assert communication.sync_batch_norm_seconds(3, 1, LINK) == 0
    assert communication.sync_batch_norm_seconds(3, 2, LINK) == pytest.approx(6 * 2e-3)


# --------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------

STEPS = 3


def train(model, batches):
    """Steps of SGD with momentum; stops between each backward pass and its update.

    The loss is a mean over images, as DDP averages it.
    """
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, 0.9)
    for x in batches:
        with fused():
            loss = sum((f * f).mean() for f in model(x))
            optimizer.zero_grad()
            loss.backward()
        yield
        optimizer.step()


def synchronized(norms):
    if norms == "fixed":
        return network()
    model = network(norm_eval=False, norm_cfg=dict(type="SyncBN"))
    model.load_state_dict(network(norm_eval=False).state_dict())
    return model


@contextlib.contextmanager
def counting():
    """Collectives by name, of this process."""
    seen = Counter()
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast"):
            function = getattr(torch.distributed, name)

            def call(*args, name=name, function=function, **kwargs):
                seen[name] += 1
                return function(*args, **kwargs)

            stack.enter_context(mock.patch.object(torch.distributed, name, call))
        yield seen


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    batches = [x.chunk(2)[rank] for x in torch.load(f"{folder}/batches.pt")]
    results = {}
    for norms in ("fixed", "of the batch"):
        model = synchronized(norms)
        # DDP refuses SyncBN on CPUs: there its sums are left to this function.
        parallel = nn.parallel.DistributedDataParallel(model) if norms == "fixed" else model
        with counting() as seen:
            for _ in train(parallel, batches):
                during = dict(seen)
                for p in model.parameters() if parallel is model else ():
                    torch.distributed.all_reduce(p.grad.div_(2))
                seen.clear()
        results[norms] = model.state_dict(), during
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The batches, and what each of two processes made of its half of them."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(3)
    batches = [images(4, 3, 40, 40) for _ in range(STEPS)]
    torch.save(batches, folder / "batches.pt")
    run_two(worker, str(folder))
    return batches, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("norms", ["fixed", "of the batch"])
def test_half_of_the_batch_each_is_the_same_training(two_processes, norms):
    """Parameters and running statistics after three steps with momentum."""
    batches, results = two_processes
    model = network(norm_eval=norms == "fixed")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in train(model, batches):
        pass
    after = model.state_dict()
    for state, _ in (result[norms] for result in results):
        for key, value in after.items():
            torch.testing.assert_close(state[key], value, msg=lambda m, k=key: f"{k}: {m}")
    assert all(not torch.equal(after[k], before[k]) for k, _ in model.named_parameters())


def test_collectives_are_those_of_the_model_on_paper(two_processes):
    """SyncBN: one a norm and direction. With fixed norms there are only the gradients'."""
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in network(norm_eval=False).modules())
    for result in two_processes[1]:
        assert result["fixed"][1] == {}  # DDP's own are not called from Python.
        assert result["of the batch"][1] == {"all_gather_into_tensor": norms, "all_reduce": norms}
    seconds = communication.sync_batch_norm_seconds(norms, 2, LINK)
    assert seconds == pytest.approx(2 * norms * LINK.small)
