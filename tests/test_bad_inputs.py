"""Bad input gets an exception that helps, and leaves the model as it was, on every backend."""

import pytest
import torch

from tests import bad_inputs
from tests.bad_inputs import SPEC, Subjects, image
from vovnet_fast import VoVNet, backends, freeze, use_backend
from vovnet_fast.compat import zip
from vovnet_fast.network import decision

ROWS = bad_inputs.rows()


@pytest.fixture(scope="module")
def subjects():
    torch.manual_seed(0)
    model = VoVNet(SPEC).eval()
    return Subjects(model, freeze(model))


@pytest.fixture(scope="module")
def before(subjects):
    with torch.no_grad(), use_backend("reference"):
        x = image().normal_()
        state = {key: value.clone() for key, value in subjects.model.state_dict().items()}
        return x, state, subjects.model(x), subjects.frozen(x)


def test_there_are_many_and_none_twice():
    assert len(ROWS) >= 150
    assert len({(row.entry, row.wrong) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.entry}: {row.wrong}")
def test_an_exception_helps(row, backend, subjects, before, monkeypatch):
    if backends.why_not(backend, None) if backend != "auto" else None:
        pytest.skip("the extension's CPU half is not built")
    monkeypatch.setattr(decision, "CPU_PIXELS", 0)  # For maps as small as these.
    check(row, backend, subjects, before)


def check(row, backend, subjects, before):
    """That a row raises what it should, and that everything is as it was before."""
    x, state, features, frozen = before
    with use_backend(backend):
        with pytest.raises(row.error, match=f"(?s){row.words}") as caught:
            row.call(subjects)
        assert type(caught.value) is not Exception
        assert str(caught.value)
    for key, value in subjects.model.state_dict().items():
        assert torch.equal(value, state[key]), key
    if row.entry in ("model(x)", "frozen(x)"):
        with torch.no_grad(), use_backend("reference"):
            assert all(torch.equal(a, b) for a, b in zip(subjects.model(x), features, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(subjects.frozen(x), frozen, strict=True))
