"""The ways in which trainers and exporters run a backbone."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from tests import straight_line
from tests.features import needs_looks
from tests.processes import run_two
from tests.tiny import FIRST, TINY
from vovnet_fast import VoVNet, backends
from vovnet_fast.compat import zip


def random_model(spec, **options):
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(spec, **options))


def loss_of(features):
    return sum((f * f).mean() for f in features)


# --------------------------------------------------------------------------------------
# Activation checkpointing
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", list(TINY))
def test_checkpointing_changes_nothing(name, momentum):
    """Features, gradients and running statistics, which are updated once."""
    plain = random_model(TINY[name], norm_eval=False).double().train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            module.reset_running_stats()
    cp = VoVNet(TINY[name], norm_eval=False, with_cp=True).double().train()
    cp.load_state_dict(plain.state_dict())
    for a, b in zip(plain.modules(), cp.modules(), strict=True):
        if isinstance(b, nn.BatchNorm2d):
            b.momentum = a.momentum
    for _ in range(2):
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        loss_of(plain(x)).backward()
        loss_of(cp(x)).backward()
    for (key, a), b in zip(plain.state_dict().items(), cp.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=key)
    for (key, a), b in zip(plain.named_parameters(), cp.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, msg=key)
    assert cp.state_dict()["stage3.OSA3_2.layers.0." + layer_norm_key(name)] == 2


def layer_norm_key(name):
    norm = "pw_norm" if name == "depthwise" else "norm"
    return f"OSA3_2_0/{norm}.num_batches_tracked"


def saved_bytes(model, x):
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model(x))
    del loss
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


def test_checkpointing_keeps_less():
    x = torch.randn(1, 3, 64, 64)
    with backends.use_backend("reference"):
        kept = [saved_bytes(VoVNet("V-19-slim-eSE", with_cp=w).train(), x) for w in (False, True)]
    assert kept[1] < 0.6 * kept[0]  # The stem, which is not checkpointed, is half of it.


def test_checkpointing_is_off_where_it_cannot_help():
    model = random_model(TINY["detectron2"], with_cp=True)
    x = torch.randn(1, 3, 64, 64)
    expected = copy.deepcopy(model).eval()(x)
    with torch.no_grad():
        for a, b in zip(model.train()(x), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_checkpointing_under_autocast():
    plain = random_model(TINY["detectron2"], norm_eval=False).train()
    cp = VoVNet(TINY["detectron2"], norm_eval=False, with_cp=True).train()
    cp.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, cp):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model(x))
        loss.backward()
    for a, b in zip(plain.parameters(), cp.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# --------------------------------------------------------------------------------------
# Distributed data parallel
# --------------------------------------------------------------------------------------


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for with_cp in (False, True):
        _ddp_steps(rank, folder, with_cp)
    torch.distributed.destroy_process_group()


def _ddp_steps(rank, folder, with_cp):
    model = random_model(TINY["detectron2"], norm_eval=False, with_cp=with_cp, frozen_stages=0)
    model = nn.parallel.DistributedDataParallel(model.double().train())
    for step in range(2):
        x = torch.load(f"{folder}/x{step}.pt")[rank::2]
        loss_of(model(x)).backward()
    state = {"grads": {k: p.grad for k, p in model.module.named_parameters()}}
    state["buffers"] = dict(model.module.named_buffers())
    torch.save(state, f"{folder}/{with_cp}-{rank}.pt")


def test_ddp_with_checkpointing(tmp_path):
    """Two gloo processes: the same gradients on both, with and without checkpointing,
    equal to the mean of what each half of the batch gives alone."""
    torch.manual_seed(1)
    batches = [torch.randn(4, 3, 64, 64, dtype=torch.float64) for _ in range(2)]
    for step, x in enumerate(batches):
        torch.save(x, tmp_path / f"x{step}.pt")
    run_two(_ddp_worker, str(tmp_path))
    states = {
        (cp, rank): torch.load(tmp_path / f"{cp}-{rank}.pt")
        for cp in (False, True)
        for rank in (0, 1)
    }
    alone = []
    for rank in (0, 1):
        model = random_model(TINY["detectron2"], norm_eval=False, frozen_stages=0).double().train()
        for x in batches:
            loss_of(model(x[rank::2])).backward()
        alone.append(model)
        for cp in (False, True):
            buffers = states[cp, rank]["buffers"]
            for key, value in model.named_buffers():
                if rank == 0 or "num_batches" in key:  # DDP broadcasts rank 0's statistics.
                    torch.testing.assert_close(buffers[key], value, msg=key)
    for (key, a), b in zip(alone[0].named_parameters(), alone[1].parameters(), strict=True):
        for state in states.values():
            if key.startswith("stem"):
                assert state["grads"][key] is None
            else:
                torch.testing.assert_close(state["grads"][key], (a.grad + b.grad) / 2, msg=key)


def test_sync_batch_norm_conversion():
    """torch's conversion replaces norms in place of use, stem included."""
    model = random_model(TINY["detectron2"])
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 64, 64)
    expected = model.eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    kinds = {type(m) for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    assert list(converted.state_dict()) == list(state)
    converted.eval()  # The norms of torch 2.1's conversion are in training mode.
    for a, b in zip(converted(x), expected, strict=True):
        torch.testing.assert_close(a, b)
    from_config = VoVNet(TINY["detectron2"], norm_cfg=dict(type="SyncBN")).eval()
    from_config.load_state_dict(state)
    for a, b in zip(from_config(x), expected, strict=True):
        torch.testing.assert_close(a, b)
    ran = []
    converted._modules["stem"]._modules["stem_1/norm"].register_forward_hook(
        lambda *_: ran.append(1)
    )
    converted(x)
    assert ran


def test_a_replaced_part_is_the_one_that_runs():
    """Quantisers and profilers swap children; no hidden reference may survive."""
    model = random_model(TINY["depthwise"]).eval()
    for key in ("stem_1/conv", "stem_2/dw_conv3x3", "stem_3/pw_norm"):
        owner, part = model.stem, model.stem._modules[key]
        ran = []

        class Watch(nn.Module):
            def __init__(self, part, ran):
                super().__init__()
                self.part, self.ran = part, ran
                self.weight = part.weight

            def forward(self, x):
                self.ran.append(1)
                return self.part(x)

        owner._modules[key] = Watch(part, ran)
        model(torch.randn(1, 3, 64, 64))
        assert ran, key


# --------------------------------------------------------------------------------------
# Compilation and export
# --------------------------------------------------------------------------------------


@needs_looks
@pytest.mark.parametrize(
    ("name", "training"), [("detectron2", False), *((name, True) for name in TINY)]
)
def test_compiles_without_a_graph_break(name, training):
    """As plain modules. In evaluation mode, as ops: tests/kernels/test_ops.py."""
    torch._dynamo.reset()  # A process may compile so many variants of forward only.
    model = random_model(TINY[name], out_features=FIRST).train(training)
    x = torch.randn(2, 3, 48, 56)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with contextlib.nullcontext() if training else torch.no_grad():
        expected, got = model(x), compiled(x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    if training:
        loss_of(expected).backward()
        loss_of(got).backward()
        grads = zip(model.parameters(), compiled.parameters(), strict=True)
        for a, b in grads:
            torch.testing.assert_close(b.grad, a.grad)


every_dialect = pytest.mark.parametrize(
    ("name", "out_features"),
    [(name, (*FIRST, "stage4", "stage5") if name == "detectron2" else FIRST) for name in TINY],
    ids=list(TINY),
)
"""With all stages of one of them."""


@needs_looks
@every_dialect
def test_export(name, out_features):
    """torch.export with a free batch and image size."""
    model = random_model(TINY[name], out_features=out_features).eval()
    batch, height, width = (torch.export.Dim(d) for d in ("batch", "height", "width"))
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 64, 96),),
        dynamic_shapes=({0: batch, 2: height * 32, 3: width * 32},),
    )
    for shape in ((2, 3, 64, 96), (1, 3, 96, 160)):
        x = torch.randn(shape)
        for a, b in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(a, b)


@needs_looks
@every_dialect
def test_onnx(name, out_features, tmp_path):
    """The exported file, run by onnxruntime, gives the features."""
    onnxruntime = pytest.importorskip("onnxruntime", exc_type=Exception)
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"the export takes {package}")
    model = random_model(TINY[name], out_features=out_features).eval()
    path = tmp_path / "vovnet.onnx"
    torch.onnx.export(
        model,
        (torch.randn(1, 3, 64, 96),),
        path,
        input_names=["image"],
        output_names=list(model.out_features),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == list(model.out_features)
    x = torch.randn(3, 3, 64, 96)
    got = session.run(None, {"image": x.numpy()})
    for a, b in zip(got, model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-4)


@pytest.mark.versions
def test_functional_call():
    """functional_call with other parameters: what DataParallel, EMA and FSDP rely on."""
    model = random_model(TINY["detectron2"]).eval()
    other = {k: v + 0.01 for k, v in model.named_parameters()}
    x = torch.randn(1, 3, 64, 64)
    got = torch.func.functional_call(model, other, (x,))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(other[key])
    for a, b in zip(got, model(x), strict=True):
        torch.testing.assert_close(a, b)
