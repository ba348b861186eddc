"""Over a real http server on this machine, which may be as bad as servers are."""

import http.server
import io
import os
import threading

import pytest
import torch

from vovnet_fast import checkpoints
from vovnet_fast.checkpoints import CheckpointError, downloads


def file_of(seed, ending=".pth"):
    state = {f"x{i}": torch.full((7, 11), seed + i / 32) for i in range(20)}
    buffer = io.BytesIO()
    if ending == ".pth":
        torch.save(state, buffer)
        return state, buffer.getvalue()
    from safetensors.torch import save

    return state, save(state)


class Site:
    """What is served: bytes by path and query, of which ``cut`` are not sent."""

    def __init__(self):
        self.files, self.cut, self.says_length, self.served = {}, 0, True, []

    def handler(self):
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.served.append(self.path)
                content = site.files.get(self.path)
                self.send_response(404 if content is None else 200)
                content = content or b"no such page"
                if site.says_length:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) - site.cut])

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    site = Site()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), site.handler())
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site.root = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    server.server_close()


def kept(tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def assert_read(url, state, **options):
    back = checkpoints.read(url, **options)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_addresses_that_end_in_one_name_have_files_of_their_own(site, tmp_path):
    """In other folders, under another query, with other letters that file names cannot have."""
    paths = ["/a/v.pth", "/b/v.pth", "/b/v.pth?revision=2", "/b/v.pth?revision=3", "/v%2Fv.pth",
             "/v/v.pth", "/c/V.pth"]  # fmt: skip
    states = {}
    for seed, path in enumerate(paths):
        states[path], site.files[path] = file_of(seed)
    for _ in range(2):
        for path, state in states.items():
            assert_read(site.root + path, state)
    assert site.served == paths, "each once"
    assert len(kept(tmp_path)) == len(paths)
    assert_read(f"{site.root}/a/v.pth#readme", states["/a/v.pth"])
    assert site.served == paths, "what follows # is no part of what is asked for"


def test_names_that_a_file_cannot_have(site, tmp_path):
    for path in ("/", "/" + "x" * 400 + ".safetensors", "/a:b*c.pth", "/..", "/%00.pth"):
        ending = ".safetensors" if path.endswith(".safetensors") else ".pth"
        state, site.files[path] = file_of(0, ending)
        assert_read(site.root + path, state)
        assert downloads.kept_at(site.root + path).parent == tmp_path / "hub" / "checkpoints"
    assert len(kept(tmp_path)) == 5


@pytest.mark.parametrize("says_length", [True, False])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_cut_download_is_not_kept(site, tmp_path, ending, says_length):
    """Where the server says how much there is, and where only reading tells."""
    url, (state, site.files[f"/v{ending}"]) = f"{site.root}/v{ending}", file_of(0, ending)
    site.cut, site.says_length = 1000, says_length
    words = r"ended after \d+ of \d+ bytes" if says_length else r"sends is no checkpoint: cannot"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=words) as raised:
            checkpoints.read(url)
        assert url in str(raised.value)
        assert kept(tmp_path) == []
    site.cut = 0
    assert_read(url, state)
    assert len(site.served) == 3


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("left", [b"", b"half", 3000])
def test_what_is_kept_and_cannot_be_read_is_downloaded_again(site, left, mmap):
    url, (state, site.files["/v.pth"]) = f"{site.root}/v.pth", file_of(0)
    assert_read(url, state, mmap=mmap)
    path = downloads.kept_at(url)
    path.write_bytes(site.files["/v.pth"][:left] if isinstance(left, int) else left)
    assert_read(url, state, mmap=mmap)
    assert_read(url, state, mmap=mmap)
    assert len(site.served) == 2


def test_pages_and_absent_files(site, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot download .*/none\.pth .*404"):
        checkpoints.read(f"{site.root}/none.pth")
    site.files["/page.pth"] = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match=r"page\.pth sends is no checkpoint"):
        checkpoints.read(f"{site.root}/page.pth")
    with pytest.raises(CheckpointError, match=r"cannot download http://127\.0\.0\.1:1/v\.pth"):
        checkpoints.read("http://127.0.0.1:1/v.pth")
    with pytest.raises(CheckpointError, match="cannot download http://"):
        checkpoints.read("http://")
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written(site, tmp_path):
    (tmp_path / "hub").write_text("no folder")
    site.files["/v.pth"] = b""
    with pytest.raises(CheckpointError, match=r"cannot download .*/v\.pth to .*hub"):
        checkpoints.read(f"{site.root}/v.pth")


def test_eight_threads_at_one_address(site, tmp_path):
    url, (state, site.files["/v.pth"]) = f"{site.root}/v.pth", file_of(0)
    errors = []

    def reading():
        try:
            assert_read(url, state)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=reading) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(kept(tmp_path)) == 1
