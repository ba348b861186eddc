"""pybind11 is somewhere else in every isolated build: only other headers compile anything again."""

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")
pytest.importorskip("pybind11", reason="native_build takes it")

import pybind11

from native_build import plan

HEADERS = {"pybind11.h": "// a", "detail/common.h": "// b"}


@pytest.fixture
def include(tmp_path, monkeypatch):
    """Asks for the flags with other headers of pybind11, in another folder each time."""

    def ask(headers):
        source = tmp_path / f"environment {len(list(tmp_path.iterdir()))}"
        for name, text in headers.items():
            path = source / "pybind11" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        # Where a distribution has it, there is more.
        (source / "others.h").touch()
        monkeypatch.setattr(pybind11, "get_include", lambda: str(source))
        return plan._includes(tmp_path / "build")

    return ask


def files(folder):
    """Contents, and when they were written."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.read_text(), path.stat().st_mtime_ns) for path in paths
    }


def test_the_same_headers_from_another_place_change_nothing(include, tmp_path):
    words = include(HEADERS)
    assert words[:2] == ["-isystem", str(tmp_path / "build" / "include")]
    before = files(tmp_path / "build" / "include")
    assert {name: text for name, (text, _) in before.items()} == {
        f"pybind11/{name}": text for name, text in HEADERS.items()
    }
    assert include(HEADERS) == words
    assert files(tmp_path / "build" / "include") == before


def test_other_headers_take_their_place(include, tmp_path):
    include(HEADERS)
    before = files(tmp_path / "build" / "include")
    include({"pybind11.h": "// a", "new.h": "// c"})
    after = files(tmp_path / "build" / "include")
    assert after["pybind11/pybind11.h"] == before["pybind11/pybind11.h"]
    assert {name: text for name, (text, _) in after.items()} == {
        "pybind11/pybind11.h": "// a",
        "pybind11/new.h": "// c",
    }
