"""Files of http(s) addresses, kept in torch.hub's cache, each address in a file of its own."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from .._files import replacing
from .._version import __version__
from ..network.filling import CheckpointError

_CHUNK = 1 << 20
_PATIENCE = 60.0  # Seconds without a byte.


def kept_at(url: str) -> Path:
    """Where the file of an address is kept, once it has been downloaded.

    Two addresses may end in the same name, and the query may say which file is meant: what tells
    them apart is a digest of the whole address.
    """
    whole = urllib.parse.urldefrag(url).url
    name = os.path.basename(urllib.parse.urlparse(whole).path)
    name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[-100:] or "checkpoint"
    digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}-{name}"


def download(url: str) -> Path:
    """Download a file, whole or not at all, in the place of what is kept of this address.

    Raises:
        CheckpointError: the address cannot be reached, has no file, or sends less than it says;
            the cache cannot be written.
    """
    path = kept_at(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            _fetch(url, file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"cannot download {url} to {path}: {error}. Look at the address and the connection, "
            "or download the file by other means and give its path"
        ) from error
    return path


def _fetch(url: str, file: IO[bytes]) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": f"vovnet_fast/{__version__}"})
    with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
        length = response.headers.get("Content-Length")
        total, got = None if length is None else int(length), 0
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("downloading", total=total)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                got += len(chunk)
                progress.update(bar, completed=got)
    if total is not None and got != total:  # Which read() does not tell from an end.
        raise OSError(f"the connection ended after {got} of {total} bytes")


def forget(path: Path) -> None:
    """Remove what is kept, as it cannot be read."""
    with contextlib.suppress(OSError):
        path.unlink()
