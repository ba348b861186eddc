"""Any network, any input, any life of a model: what plain modules say, or an error says why.

``EXAMPLES=500`` draws as many, at random, instead of the few that are always the same.
"""

import copy
import io
import os
import pickle
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests import straight_line  # noqa: E402
from tests.features import compared  # noqa: E402
from tests.fused import fused  # noqa: E402
from tests.network.test_changed_modules import CHANGES  # noqa: E402
from tests.tiny import TINY  # noqa: E402
from vovnet_fast import VoVNet, backends, checkpoints, freeze, use_backend  # noqa: E402
from vovnet_fast.backends import BackendError  # noqa: E402
from vovnet_fast.compat import zip  # noqa: E402
from vovnet_fast.network import decision  # noqa: E402

EXAMPLES = int(os.environ.get("EXAMPLES", "8"))
DRAWN = settings(
    max_examples=EXAMPLES,
    stateful_step_count=8 if EXAMPLES == 8 else 20,
    deadline=None,
    derandomize=EXAMPLES == 8,  # What CI says must not depend on luck.
    suppress_health_check=list(HealthCheck),
)

CPU = backends.why_not("cpu", None) is None


@st.composite
def architectures(draw):
    base = TINY[draw(st.sampled_from(sorted(TINY)))]
    widths = st.sampled_from((4, 8, 12))
    stem = draw(st.tuples(widths, widths, st.sampled_from((8, 16))))
    if base.depthwise:
        stem = (stem[0],) * 3
    return replace(
        base,
        name="drawn",
        stem_channels=stem,
        layers_per_block=draw(st.integers(1, 3)),
        blocks_per_stage=(1, draw(st.integers(1, 2)), 1, draw(st.integers(1, 2))),
        mid_channels=tuple(draw(widths) for _ in range(4)),
        out_channels=tuple(draw(st.sampled_from((16, 24))) for _ in range(4)),
        ese=draw(st.sampled_from(("every", "last", "none"))),
        gate=draw(st.sampled_from(("hard_sigmoid", "sigmoid"))),
        identity=draw(st.sampled_from(("after_first", "equal_width", "none"))),
        pointwise_bias=draw(st.booleans()),
    )


@st.composite
def images(draw, dtype):
    n, h, w = draw(st.integers(0, 2)), draw(st.integers(33, 44)), draw(st.integers(33, 44))
    torch.manual_seed(draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(("NCHW", "channels_last", "sliced", "flipped", "expanded")))
    if layout == "sliced":
        return torch.randn(n, 5, h + 3, 2 * w, dtype=dtype)[:, 1:4, 2:-1, ::2]
    x = torch.randn(n, 3, h, w, dtype=dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "flipped":
        return x.mT
    return x[..., :1].expand(n, 3, h, w) if layout == "expanded" else x


def outputs_and_gradients(model, x):
    model.zero_grad()
    features = model(x)
    if torch.is_grad_enabled() and any(y.requires_grad for y in features):
        sum((y * y).sum() for y in features).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [y.detach() for y in features], gradients, dict(model.named_buffers())


@DRAWN
@given(st.data())
def test_any_network_on_any_input(data):
    spec = data.draw(architectures())
    names = ("stem_2", "stem", "stage2", "stage3", "stage4", "stage5")
    wanted = tuple(n for n in names if data.draw(st.booleans())) or ("stage3",)
    model = VoVNet(
        spec,
        out_features=wanted,
        frozen_stages=data.draw(st.integers(-1, 4)),
        norm_eval=data.draw(st.booleans()),
        norm_cfg=dict(type=data.draw(st.sampled_from(("BN", "FrozenBN")))),
        with_cp=data.draw(st.booleans()),
    )
    straight_line.randomise(model).double().train(data.draw(st.booleans()))
    x = data.draw(images(torch.float64))
    gradient = data.draw(st.booleans())
    twin = copy.deepcopy(model)
    with torch.set_grad_enabled(gradient):
        expected, refused = None, ""
        try:
            with use_backend("reference"):
                expected = outputs_and_gradients(twin, x)
        except ValueError as error:  # Batch norm of a single value, say.
            refused = str(error)
        assert expected is not None or "more than 1 value" in refused
        contexts = [("auto", fused())] + ([("cpu", use_backend("cpu"))] if CPU else [])
        for name, context in contexts:
            again = copy.deepcopy(model)
            with context:
                try:
                    found = outputs_and_gradients(again, x)
                except ValueError as error:
                    found, refused = None, str(error)
            # Asked for by name, no images have no statistics for it either.
            if expected is None or (found is None and name == "cpu" and len(x) == 0):
                assert found is None
                assert re.search("more than (one|1) value", refused)
            else:
                torch.testing.assert_close(found, expected)


@DRAWN
@given(st.data())
def test_low_precision_is_no_worse_than_eager(data):
    spec = data.draw(architectures())
    model = straight_line.randomise(VoVNet(spec)).eval()
    dtype = data.draw(st.sampled_from(compared((torch.float32, torch.bfloat16, torch.float16))))
    x = data.draw(images(torch.float64))
    low, image = copy.deepcopy(model).to(dtype), x.to(dtype)
    exact = copy.deepcopy(low).double()
    with torch.no_grad(), use_backend("reference"):
        right, eager = exact(image.double()), low(image)
    for context in [fused()] + ([use_backend("cpu")] if CPU else []):
        with torch.no_grad(), context:
            for found in (low(image), freeze(low)(image)):
                for a, b, c in zip(found, eager, right, strict=True):
                    ours, theirs = ((t.double() - c).norm() for t in (a, b))
                    # A map of one pixel has few errors, and eager is lucky in one of 500.
                    assert ours <= 2 * theirs + 2 * torch.finfo(dtype).eps * c.norm()


class Life(RuleBasedStateMachine):
    """A model that runs fused, and one to which the same happens and which never does."""

    @initialize(name=st.sampled_from(sorted(TINY)), norm_eval=st.booleans(), with_cp=st.booleans())
    def build(self, name, norm_eval, with_cp):
        torch.manual_seed(0)
        model = VoVNet(TINY[name], norm_eval=norm_eval, with_cp=with_cp)
        self.ours = straight_line.randomise(model).double().train()
        self.theirs = copy.deepcopy(self.ours)
        self.hooks, self.changed = [], False
        self.seed = 0

    def both(self, act):
        act(self.ours)
        act(self.theirs)

    @rule(mode=st.booleans())
    def train(self, mode):
        self.both(lambda m: m.train(mode))

    @rule(seed=st.integers(0, 9))
    def load(self, seed):
        def act(model):
            generator = torch.Generator().manual_seed(seed)
            state = {
                k: v + 0.01 * torch.rand(v.shape, generator=generator, dtype=v.dtype)
                if v.is_floating_point()
                else v
                for k, v in model.state_dict().items()
            }
            model.load_state_dict(state)

        self.both(act)

    @rule()
    def copy(self):
        self.ours = copy.deepcopy(self.ours)

    @precondition(lambda self: not self.changed and not self.hooks)
    @rule()
    def pickle(self):
        self.ours = pickle.loads(pickle.dumps(self.ours))

    @precondition(lambda self: not self.changed and not self.hooks)
    @rule()
    def save(self):
        file = io.BytesIO()
        torch.save(self.ours, file)
        file.seek(0)
        self.ours = torch.load(file, weights_only=False)

    @rule(dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)))
    def convert(self, dtype):
        self.both(lambda m: m.to(dtype).double())

    @precondition(lambda self: not self.changed and self.ours.spec.dialect == "timm")
    @rule()
    def convert_a_checkpoint(self):
        def act(model):
            state = checkpoints.convert(model.state_dict(), model.spec, "timm")
            checkpoints.load(model, state)

        self.both(act)

    @precondition(lambda self: EXAMPLES != 8)  # It takes seconds.
    @rule()
    def compile(self):
        torch.compiler.reset()  # It does not look for hooks again where it has traced.
        compiled = torch.compile(self.ours, backend="eager")
        x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
        with torch.no_grad():
            with fused():
                twin, other = copy.deepcopy(self.ours), copy.deepcopy(self.theirs)
                found = compiled(x)
                self.ours.load_state_dict(twin.state_dict())
            with use_backend("reference"):
                torch.testing.assert_close(found, other(x))

    @rule(layout=st.sampled_from((torch.channels_last, torch.contiguous_format)))
    def lay_out(self, layout):
        self.both(lambda m: m.to(memory_format=layout))

    @rule(index=st.integers(0, 200))
    def freeze_a_parameter(self, index):
        def act(model):
            parameters = list(model.parameters())
            parameters[index % len(parameters)].requires_grad_(index % 2 == 0)

        self.both(act)

    @rule(stages=st.integers(-1, 3))
    def freeze_stages(self, stages):
        self.both(lambda m: setattr(m, "frozen_stages", stages) or m.train())

    @rule(index=st.integers(0, 200))
    def hook(self, index):
        def act(model):
            modules = [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
            chosen = modules[index % len(modules)]
            if isinstance(chosen, VoVNet) or "Stem" in type(chosen).__name__:
                chosen = next(model.stage3.children())
            self.hooks.append(chosen.register_forward_hook(lambda m, x, y: y * 1.25))

        self.both(act)

    @rule()
    def unhook(self):
        # Of copies too, whose handles nobody has.
        self.both(lambda m: [module._forward_hooks.clear() for module in m.modules()])
        self.hooks.clear()

    @precondition(lambda self: not self.changed and self.ours.spec.name == "tiny-detectron2")
    @rule(
        name=st.sampled_from(sorted(n for n in CHANGES if "old" not in n and "spectral" not in n))
    )
    def change(self, name):
        # Copies of instances' own forwards would call the original's module.
        self.changed = True
        self.both(CHANGES[name])

    @rule()
    def step(self):
        def act(model, context):
            torch.manual_seed(self.seed)
            x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
            with context:
                _, gradients, _ = outputs_and_gradients(model, x)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if gradients[name] is not None:
                        p -= 1e-4 * gradients[name].clamp(-1, 1)

        act(self.ours, fused())
        act(self.theirs, use_backend("reference"))

    @rule()
    def freeze(self):
        x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
        if self.ours.why_other() is not None:
            assert self.hooks or self.changed
            with pytest.raises(BackendError, match="freeze: "):
                freeze(self.ours)
            return
        frozen = freeze(self.ours)
        twin = nn.Module.train(copy.deepcopy(self.theirs), False)
        with torch.no_grad(), use_backend("reference"):
            torch.testing.assert_close(frozen(x), twin(x))

    @invariant()
    def says_the_same(self):
        if not hasattr(self, "ours"):
            return
        self.seed += 1
        torch.manual_seed(self.seed)
        x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
        with fused():
            found = outputs_and_gradients(self.ours, x)
        with use_backend("reference"):
            expected = outputs_and_gradients(self.theirs, x)
        torch.testing.assert_close(found, expected)


TestLife = Life.TestCase
TestLife.settings = DRAWN


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    monkeypatch.setattr(decision, "CPU_PIXELS", 0)
    monkeypatch.setattr(decision, "CPU_PIXELS_TRAINING", 0)
