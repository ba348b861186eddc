"""Training on the fused path: gradients, statistics, memory, and the modes of trainers.

The backend of plain PyTorch does the work here (tests/fused.py); the kernels' gradients
are tested in tests/kernels.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests import straight_line
from tests.features import HALF
from tests.fused import fused, needs_traces
from tests.processes import run_two
from tests.tiny import FIRST, TINY
from vovnet_fast import VoVNet, backends, compat, ops
from vovnet_fast.compat import zip
from vovnet_fast.network.blocks import OSABlock
from vovnet_fast.network.norms import FrozenBatchNorm2d
from vovnet_fast.ops import rooms

MODES = {
    "fixed": dict(),
    "batch": dict(norm_eval=False),
    "frozen norms": dict(norm_cfg=dict(type="FrozenBN")),
    "partly frozen": dict(frozen_stages=1, norm_eval=False),
    "recomputed": dict(with_cp=True),
    "recomputed batch": dict(with_cp=True, norm_eval=False),
    "stem features": dict(out_features=("stem_2", "stem", "stage3")),
}


def network(name="detectron2", dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = straight_line.randomise(VoVNet(TINY[name], **options))
    return model.to(dtype).train()


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def loss_of(features):
    return sum((f * f).mean() for f in features)


def plain():
    """Let modules run as plain PyTorch."""
    return backends.use_backend("reference")


def step(model, x, *, through_ops):
    with fused() if through_ops else plain():
        features = model(x)
        loss_of(features).backward()
    return features


def assert_same_gradients(got, expected):
    """Of parameters, and running statistics."""
    for (key, p), q in zip(expected.named_parameters(), got.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, key
        else:
            torch.testing.assert_close(q.grad, p.grad, msg=lambda m, key=key: f"{key}: {m}")
    for (key, p), q in zip(expected.named_buffers(), got.named_buffers(), strict=True):
        torch.testing.assert_close(q[1], p, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", list(TINY))
def test_networks(name, mode):
    """Features, gradients accumulated over two steps, running statistics."""
    eager = network(name, **MODES[mode])
    ours = copy.deepcopy(eager)
    for size in ((64, 48), (37, 45)):
        x = images(2, 3, *size)
        expected, got = step(eager, x, through_ops=False), step(ours, x, through_ops=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert_same_gradients(ours, eager)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_running_statistics(momentum):
    """Cumulative averages too, statistics that are not tracked, and convolutions with a bias."""
    eager = network("seed", norm_eval=False)
    norms = [m for m in eager.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = momentum
    for norm in norms[::3]:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    ours = copy.deepcopy(eager)
    for _ in range(3):
        x = images(2, 3, 40, 40)
        step(eager, x, through_ops=False)
        step(ours, x, through_ops=True)
    assert_same_gradients(ours, eager)
    with torch.no_grad(), fused():  # Training mode without gradients updates them as well.
        ours(x)
    with torch.no_grad():
        eager(x)
    assert_same_gradients(ours, eager)


def test_blocks_with_some_norms_fixed():
    eager = network(norm_eval=False)
    for i, norm in enumerate(m for m in eager.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train(i % 2 == 0)
    ours = copy.deepcopy(eager)
    x = images(2, 3, 40, 40)
    step(eager, x, through_ops=False)
    step(ours, x, through_ops=True)
    assert_same_gradients(ours, eager)


def test_only_some_parameters_need_gradients():
    eager = network()
    for i, p in enumerate(eager.parameters()):
        p.requires_grad = i % 5 == 3
    ours = copy.deepcopy(eager)
    x = images(2, 3, 40, 40).requires_grad_()
    step(eager, x, through_ops=False)
    expected, x.grad = x.grad, None
    step(ours, x, through_ops=True)
    torch.testing.assert_close(x.grad, expected)
    assert_same_gradients(ours, eager)


# --------------------------------------------------------------------------------------
# Gradients of single ops
# --------------------------------------------------------------------------------------


def test_every_op_by_gradcheck():
    torch.manual_seed(0)
    model = network("depthwise")
    block = next(b for b in model.modules() if isinstance(b, OSABlock) and b.plan.reduction)
    params, stem = block.fold(torch.float64), model.stem.fold(torch.float64)
    check = torch.autograd.gradcheck
    x, y = images(2, 3, 7, 5).requires_grad_(), images(2, 8, 5, 4).requires_grad_()
    with fused():
        for layer in (stem[0], stem[0]._replace(eps=1e-5)):
            values = [t.detach().requires_grad_() for t in layer[:3]]
            assert check(
                lambda x, *v, rest=layer[3:]: ops.conv_bn_relu(x, ops.ConvParams(*v, *rest)),
                (x, *values),
                fast_mode=True,
            )
        assert check(ops.max_pool, (y,), fast_mode=True)
        assert check(lambda y: ops.max_pool(y, "padded"), (y,), fast_mode=True)
        weight, bias = images(8, 8).requires_grad_(), images(8).requires_grad_()
        for gate in ("hard_sigmoid", "sigmoid"):
            assert check(lambda y, w, b, kind=gate: ops.ese(y, w, b, kind, y), (y, weight, bias))
        z = images(1, params.in_channels, 4, 3).requires_grad_()
        assert check(lambda z: ops.osa_block(z, params), (z,), fast_mode=True)


def strange_gradients(out):
    """Gradients as autograd hands them on: expanded, NCHW, sliced."""
    yield torch.ones((), dtype=out.dtype).expand_as(out)
    yield torch.randn(out.shape, dtype=out.dtype)
    wide = torch.randn(out.shape[0], 2 * out.shape[1] + 3, *out.shape[2:], dtype=out.dtype)
    yield wide[:, 1 : 1 + out.shape[1]]
    yield wide.to(memory_format=torch.channels_last)[:, 3 : 3 + out.shape[1]]


def test_gradients_of_any_layout():
    model, x = network(), images(2, 3, 40, 40).requires_grad_()
    inputs = [x, *model.parameters()]
    expected = model(x)
    with fused():
        got = model(x)
    for layouts in zip(*(strange_gradients(f) for f in expected), strict=True):
        grads = [
            torch.autograd.grad(f, inputs, layouts, retain_graph=True) for f in (got, expected)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_outputs_that_nobody_used():
    model, x = network(), images(2, 3, 40, 40)
    for used in ([1], [0, 2]):
        expected = model(x)
        with fused():
            got = model(x)
        grads = [
            torch.autograd.grad(loss_of(f[i] for i in used), model.parameters(), allow_unused=True)
            for f in (got, expected)
        ]
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.testing.assert_close(a, b) is None


def test_second_derivatives_are_refused():
    model, x = network(), images(2, 3, 40, 40).requires_grad_()
    y = images(1, 8, 6, 6).requires_grad_()
    weight, bias = images(8, 8), images(8)
    with fused():
        for call, name in (
            (lambda: ops.ese(y, weight, bias), "ese"),
            (lambda: ops.max_pool(y), "max_pool"),
            (lambda: model.stem(x)[1], "conv_chain"),
            (lambda: model.stage2(model.stem(x)[1].detach().requires_grad_()), "osa_block"),
        ):
            out = call()
            source = y if name in ("ese", "max_pool") else next(model.parameters())
            source = model.stage2.OSA2_1.ese.fc.weight if name == "osa_block" else source
            [grad] = torch.autograd.grad((out * out).sum(), source, create_graph=True)
            with pytest.raises(NotImplementedError, match=f"ops.{name} has no second derivative"):
                grad.sum().backward()


def test_inputs_that_batch_norm_cannot_take():
    model = network(norm_eval=False)
    with fused(), pytest.raises(ValueError, match="more than one value a channel, got 1"):
        model.stage2(images(1, 16, 1, 1))


# --------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------


def saved_bytes(module, call):
    """Bytes that autograd keeps, those of parameters and buffers left out."""
    sizes = {}

    def pack(t):
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    del out
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("spec", ["V-39-eSE", "V-99-eSE"])
@pytest.mark.parametrize(("norm_eval", "limit"), [(True, 0.45), (False, 0.60)])
def test_blocks_keep_less_than_eager(spec, norm_eval, limit):
    model = VoVNet(spec, norm_eval=norm_eval).train().to(memory_format=torch.channels_last)
    for block in (b for b in model.modules() if isinstance(b, OSABlock) and b.plan.index < 3):
        x = torch.randn(1, block.plan.in_channels, 16, 16).requires_grad_()
        with plain():
            eager = saved_bytes(block, lambda block=block, x=x: block(x * 1))
        with fused():
            ours = saved_bytes(block, lambda block=block, x=x: block(x * 1))
        assert 0 < ours <= limit * eager, block.plan.name


def test_networks_keep_less_than_eager():
    model, x = VoVNet("V-39-eSE").train(), torch.randn(1, 3, 96, 96)
    with plain():
        eager = saved_bytes(model, lambda: model(x))
    with fused():
        ours = saved_bytes(model, lambda: model(x))
        recomputed = VoVNet("V-39-eSE", with_cp=True).train()
        least = saved_bytes(recomputed, lambda: recomputed(x))
    assert ours <= 0.42 * eager
    assert least <= 0.6 * ours  # The stem and the pools are what it keeps beside the inputs.


def test_frozen_stages_keep_nothing():
    model = network(frozen_stages=4)
    with fused():
        assert saved_bytes(model, lambda: model(images(1, 3, 40, 40))) == 0


def test_inputs_are_made_where_they_are_needed(monkeypatch):
    """No block copies its input, and none takes what is not there for it."""
    model, x = network(), images(2, 3, 40, 40)
    taken = []
    take = rooms.take
    monkeypatch.setattr(rooms, "take", lambda *a: taken.append(take(*a)) or taken[-1])
    with fused():
        expected = model(x)
        assert len(taken) == 6
        assert all(buffer is not None for buffer in taken)
        taken.clear()
        loss_of(expected).backward()
        x = model.stem(x)[1].detach()
        room = rooms.new(x.permute(0, 2, 3, 1), 2, 10, 10, 16, model.stage2.room(x, 200))
        room.copy_(x.permute(0, 2, 3, 1))
        x = room.permute(0, 3, 1, 2)
        first, second = model.stage2(x), model.stage2(x)
        assert [buffer is None for buffer in taken] == [False, True]
        torch.testing.assert_close(first, second)
        model.stage2(x[:1])
        assert taken[-1] is None


def test_features_may_be_modified_in_place():
    model, x = network(out_features=("stage4",)), images(1, 3, 40, 40)
    eager = copy.deepcopy(model)
    loss_of([eager(x)[0].mul_(2)]).backward()
    with fused():
        loss_of([model(x)[0].mul_(2)]).backward()
    assert_same_gradients(model, eager)


# --------------------------------------------------------------------------------------
# Modes of trainers
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_autocast_is_no_worse_than_eager(dtype, norm_eval):
    """Features and gradients against fp64, and gradients stay in fp32."""
    exact = network(norm_eval=norm_eval)
    x = images(2, 3, 48, 40)
    step(exact, x, through_ops=False)
    errors = []
    for through_ops in (False, True):
        model = network(norm_eval=norm_eval, dtype=torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            features = step(model, x.float(), through_ops=through_ops)
        assert all(f.dtype == dtype for f in features)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors.append(sum((p.grad - q.grad).norm() / q.grad.norm() for p, q in pairs))
    assert errors[1] <= 2 * errors[0]


@pytest.mark.versions
def test_grad_scaler():
    model = network(dtype=torch.float32)
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip(f"torch {torch.__version__} scales no gradients on a CPU")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    with fused(), torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(f.float() for f in model(images(2, 3, 40, 40, dtype=torch.float32)))
    with fused():
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 256.0  # No gradient overflowed, and the step was made.
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", ["fixed", "batch"])
def test_checkpointing_by_others(mode):
    """torch.utils.checkpoint around each block, and activations moved away and back."""
    eager = network(**MODES[mode])
    ours, moved = copy.deepcopy(eager), copy.deepcopy(eager)
    x = images(2, 3, 40, 40)
    step(eager, x, through_ops=False)
    for block in [b for b in ours.modules() if isinstance(b, OSABlock)]:
        forward = block.forward
        block.forward = lambda x, forward=forward, **kw: checkpoint(
            forward, x, use_reentrant=False, **kw
        )
    step(ours, x, through_ops=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    )
    with hooks:
        step(moved, x, through_ops=True)
    assert_same_gradients(moved, eager)
    if mode == "fixed":  # Others' checkpointing runs norms twice; with_cp is for that.
        assert_same_gradients(ours, eager)


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "deterministic", True, raising=False)  # torch 2.1
    model = network(norm_eval=False)
    twin, x = copy.deepcopy(model), images(2, 3, 40, 40)
    torch.use_deterministic_algorithms(True)
    try:
        step(model, x, through_ops=True)
        step(twin, x, through_ops=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@needs_traces
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("detectron2", m) for m in ("fixed", "batch", "recomputed batch", "partly frozen")),
        *(("depthwise", m) for m in ("fixed", "batch")),
    ],
)
def test_compiles_without_a_graph_break(name, mode):
    """Forward and backward."""
    torch._dynamo.reset()  # A process may compile so many variants of forward only.
    eager = network(name, out_features=FIRST, **MODES[mode])
    ours = copy.deepcopy(eager)
    x = images(2, 3, 40, 40)
    step(eager, x, through_ops=False)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    step(compiled, x, through_ops=True)
    assert_same_gradients(ours, eager)


@pytest.mark.versions
@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="torch 2.3 checks no ops")
def test_custom_ops_pass_torchs_own_checks():
    """Schemas, fakes, aliasing, and the registration of gradients."""
    calls = []
    model = network("depthwise", norm_eval=False)
    model.stage3.eval()
    x = images(2, 3, 40, 40)

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vovnet_fast":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with fused(watched=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr("vovnet_fast.ops._checks.traced", lambda x: True)
        with Catch():
            loss_of(model(x)).backward()
            y = images(1, 8, 4, 4).requires_grad_()
            ops.ese(y, images(8, 8), images(8)).sum().backward()
        names = {str(func).split(".")[1] for func, _ in calls}
        forward = {"conv_chain", "max_pool", "osa_block", "ese"}
        assert names == forward | {f"{name}_backward" for name in forward}
        utils = ("test_schema", "test_faketensor", "test_autograd_registration")
        for func, args in calls:
            torch.library.opcheck(func, args, test_utils=utils)


def test_ten_steps_follow_the_reference():
    """The loss curve of a tiny network that learns. In fp64: rounding errors grow with steps."""
    curves = []
    for through_ops in (False, True):
        model = network(norm_eval=False)
        head = nn.Linear(40, 4).double()
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], 0.1, 0.9)
        curve = []
        with fused() if through_ops else plain():
            for seed in range(10):
                torch.manual_seed(seed)
                labels = torch.randint(4, (8,))
                x = images(8, 3, 40, 40) * (1 + labels[:, None, None, None])
                logits = head(model(x)[-1].mean((2, 3)))
                loss = nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-3:].mean() < 0.8 * curves[0][:3].mean()
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------


KINDS = {"sync": 4, "ddp": 3, "ddp recomputed": 3}
SHARDED = {"fsdp": OSABlock, "fsdp of convolutions": nn.Conv2d} if compat.TORCH >= (2, 6) else {}
KINDS.update(dict.fromkeys(SHARDED, 3))
"""Of training in several processes, and how many images each has."""


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for kind in KINDS:
        try:
            torch.save(_train(rank, kind), f"{folder}/{kind}-{rank}.pt")
        except Exception as error:  # Ends both: the other would wait for this one.
            raise RuntimeError(f"training of the kind {kind!r} failed") from error
    torch.distributed.destroy_process_group()


def _batch(kind):
    torch.manual_seed(1)
    return images(KINDS[kind], 3, 40, 40)


def _train(rank, kind):
    """Gradients of a process, and its buffers."""
    x = _batch(kind)
    # Of unequal size: statistics must be weighted by it.
    share = x[:1] if rank == 0 else x[1:]
    if kind == "sync":
        model = network(norm_eval=False, norm_cfg=dict(type="SyncBN"))
        model.load_state_dict(network(norm_eval=False).state_dict())
    else:
        model = network("seed", norm_eval=False, with_cp=kind == "ddp recomputed")
    if kind in SHARDED:
        from torch.distributed.fsdp import fully_shard

        for part in [m for m in model.modules() if isinstance(m, SHARDED[kind])]:
            fully_shard(part)
        fully_shard(model)
    wrapped = nn.parallel.DistributedDataParallel(model) if "ddp" in kind else model
    with fused():
        features = wrapped(share)
        # Twice, so that the mean over processes is the sum.
        sum((f * f).sum() for f in features).mul(2).backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    if kind in SHARDED:
        grads = {k: grad.full_tensor() for k, grad in grads.items()}
    if kind == "sync":  # DDP itself refuses SyncBN on CPUs.
        for grad in grads.values():
            torch.distributed.all_reduce(grad.div_(2))
    return grads, dict(model.named_buffers())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What both processes have of each kind. They start once: that takes longest."""
    folder = tmp_path_factory.mktemp("processes")
    run_two(_worker, str(folder))

    return lambda kind: [torch.load(folder / f"{kind}-{rank}.pt") for rank in (0, 1)]


def test_sync_batch_norm_is_one_process_on_the_joined_batch(trained):
    x, results = _batch("sync"), trained("sync")
    model = network(norm_eval=False)
    sum((f * f).sum() for f in model(x)).backward()
    for grads, buffers in results:
        for key, p in model.named_parameters():
            torch.testing.assert_close(grads[key], p.grad, msg=lambda m, k=key: f"{k}: {m}")
        for key, value in model.named_buffers():
            torch.testing.assert_close(buffers[key], value, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kind", ["ddp", "ddp recomputed", *SHARDED])
def test_data_parallel(trained, kind):
    x, results = _batch(kind), trained(kind)
    by_share = []
    for share in (x[:1], x[1:]):
        model = network("seed", norm_eval=False)
        sum((f * f).sum() for f in model(share)).backward()
        by_share.append([p.grad for p in model.parameters()])
    expected = [a + b for a, b in zip(*by_share, strict=True)]
    for grads, _ in results:
        for (key, _), right in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(grads[key], right, msg=lambda m, k=key: f"{k}: {m}")


def test_norms_that_the_fused_path_does_not_know():
    """Group norms run on plain modules where no backend was asked for by name."""
    model = network(norm_cfg=dict(type="GN", num_groups=4))
    x = images(1, 3, 40, 40)
    expected = model(x)
    with fused():
        for a, b in zip(model(x), expected, strict=True):
            torch.testing.assert_close(a, b)
    frozen = network(norm_cfg=dict(type="FrozenBN"))
    assert any(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules())
