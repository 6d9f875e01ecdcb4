"""CIFAR's archives over HTTP: resumed after an interruption, whole and verified before anything reads them."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PIECE = 2**20
ATTEMPTS = 5
PAUSE = 2.0  # seconds before the second attempt, twice as many before each further one
TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """What is fetched, and what it must be."""

    url: str
    sha256: str
    size: int


# Sizes and digests of what the authors publish; their page has MD5s of the same files, c32a1d4a... and 03b5dce0...
ARCHIVES: Mapping[str, Archive] = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        170_052_171,
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        168_513_733,
    ),
}


def fetch(archive: Archive, path: Path) -> None:
    """Make ``path`` the file that ``archive`` describes: nothing to do if it is that already.

    What has come is kept in a hidden neighbour until it is complete, also when the process is killed, and is gone on
    from by the next call. Several processes may call at once: one fetches, the others wait. Raises ValueError where
    the bytes are others than they must be, ``path`` itself then being as before, and OSError where the server, the
    network or the disk fails.
    """
    if path.exists():
        _verify(path, path, archive)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "ab") as file, _alone(file):
        if path.exists():  # another process was faster
            part.unlink(missing_ok=True)
            return
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _receive(archive, file)
                break
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                gone = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
                if attempt == ATTEMPTS or gone:
                    reason = getattr(error, "reason", None) or error
                    raise OSError(
                        f"--download: {archive.url}: {reason} ({attempt} of {ATTEMPTS} attempts, {file.tell()} of "
                        f"{archive.size} bytes are kept in {part})"
                    ) from error
                time.sleep(PAUSE * 2 ** (attempt - 1))
        file.flush()
        os.fsync(file.fileno())
        try:
            _verify(part, path, archive)
        except ValueError:
            part.unlink()
            raise
        os.replace(part, path)


def _verify(file: Path, name: Path, archive: Archive) -> None:
    digest, size = hashlib.sha256(), file.stat().st_size
    if size == archive.size:
        with open(file, "rb") as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
    if size != archive.size or digest.hexdigest() != archive.sha256:
        found = digest.hexdigest() if size == archive.size else "not looked at"
        raise ValueError(
            f"--download: {name}: not what {archive.url} should be: {size} bytes, SHA-256 {found}; expected "
            f"{archive.size} bytes, {archive.sha256}"
        )


def _receive(archive: Archive, file: IO[bytes]) -> None:
    """Append what is missing; never more than ``archive.size`` and a piece."""
    have = file.seek(0, os.SEEK_END)
    if have >= archive.size:
        return
    request = urllib.request.Request(archive.url, headers={"User-Agent": "fused_preact"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, _bar(archive, have) as show:
        if have and answer.status != 206:  # the server sends all of it again
            file.truncate(0)
            file.seek(0)
        while file.tell() <= archive.size and (piece := answer.read(PIECE)):
            file.write(piece)
            show(len(piece))
    if file.tell() < archive.size:
        raise ConnectionError(f"ended after {file.tell()} of {archive.size} bytes")


@contextmanager
def _alone(file: IO[bytes]) -> Iterator[None]:
    """Let one process at a time fetch into ``file``; without locks where the system or the disk has none."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # the lock goes with the file


@contextmanager
def _bar(archive: Archive, have: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    name = archive.url.rpartition("/")[2]
    with tqdm(total=archive.size, initial=have, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        yield bar.update
