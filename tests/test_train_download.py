"""``--download`` against a server in this process: resumed, verified, whole or not there."""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_train_data import TINY, write

from fused_preact.train import cli
from fused_preact.train.data import cifar, download, load
from fused_preact.train.data.download import Archive, fetch

BODY = np.random.default_rng(0).bytes(3_000_000)


@dataclass
class Server:
    """What is served, what happens to it, and what was asked for."""

    url: str = ""
    body: bytes = BODY
    ranges: bool = True
    status: int = 200
    drop: list[int] = field(default_factory=list)
    """After how many bytes each connection breaks; the ones after these do not."""
    asked: list[str] = field(default_factory=list)

    @property
    def archive(self) -> Archive:
        return Archive(self.url, hashlib.sha256(BODY).hexdigest(), len(BODY))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.asked.append(wanted)
            if state.status != 200:
                self.send_error(state.status)
                return
            begin = int(wanted[6:-1]) if wanted and state.ranges else 0
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(state.body) - begin))
            self.end_headers()
            sent = state.drop.pop(0) if state.drop else len(state.body)
            self.wfile.write(state.body[begin : begin + sent])

        def log_message(self, *words: object) -> None:
            pass

    monkeypatch.setattr(download, "PAUSE", 0.01)
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{serving.server_port}/cifar-10-binary.tar.gz"
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    serving.shutdown()
    serving.server_close()
    thread.join()


def test_a_broken_connection_is_gone_on_from(server: Server, tmp_path: Path) -> None:
    server.drop = [1_000_000, 700_000]
    fetch(server.archive, tmp_path / "new" / "a.gz")
    assert (tmp_path / "new" / "a.gz").read_bytes() == BODY
    assert server.asked == ["", "bytes=1000000-", "bytes=1700000-"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.gz"]


def test_a_server_without_ranges_sends_everything_again(server: Server, tmp_path: Path) -> None:
    server.drop, server.ranges = [1_000_000], False
    fetch(server.archive, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == BODY


def test_a_killed_process_is_gone_on_from(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".a.gz.part").write_bytes(BODY[:2_000_000])
    fetch(server.archive, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == BODY
    assert server.asked == ["bytes=2000000-"]
    fetch(server.archive, tmp_path / "a.gz")
    assert len(server.asked) == 1, "what is there is not fetched again"


@pytest.mark.parametrize("what", ["other bytes", "too long", "partly other bytes"])
def test_other_bytes_are_refused_and_not_kept(what: str, server: Server, tmp_path: Path) -> None:
    if what == "partly other bytes":
        (tmp_path / ".a.gz.part").write_bytes(b"x" * 1000)
    else:
        server.body = BODY[:-1] + bytes([BODY[-1] ^ 1]) if what == "other bytes" else BODY * 4
    with pytest.raises(ValueError, match=r"--download: .*a\.gz: not what http.*expected 3000000 bytes, "):
        fetch(server.archive, tmp_path / "a.gz")
    assert list(tmp_path.iterdir()) == []
    if what == "partly other bytes":
        fetch(server.archive, tmp_path / "a.gz")


def test_another_archive_in_its_place_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(b"somebody's own")
    with pytest.raises(ValueError, match=r"a\.gz: not what .*: 14 bytes"):
        fetch(server.archive, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == b"somebody's own"
    assert server.asked == []


def test_a_server_that_fails_is_named(server: Server, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(
        OSError, match=r"--download: http.*Service Unavailable \(5 of 5 attempts, 0 of 3000000"
    ):
        fetch(server.archive, tmp_path / "a.gz")
    server.status, server.asked = 404, []
    with pytest.raises(OSError, match=r"Not Found \(1 of 5 attempts"):
        fetch(server.archive, tmp_path / "a.gz")
    assert len(server.asked) == 1
    nowhere = replace(server.archive, url="http://127.0.0.1:1/a.gz")
    with pytest.raises(OSError, match=r"--download: http://127\.0\.0\.1:1/a\.gz: .*refused"):
        fetch(nowhere, tmp_path / "a.gz")


def test_processes_of_one_run_fetch_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(server.archive, tmp_path / "a.gz")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.asked == [""]
    assert [path.read_bytes() == BODY for path in tmp_path.iterdir()] == [True], "and nothing else is left"


def test_the_program_downloads_what_it_reads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cifar, "LAYOUTS", TINY)
    write("cifar10", "archive", tmp_path)
    path = tmp_path / TINY["cifar10"].archive
    server.body, good = path.read_bytes(), load("cifar10", str(tmp_path))
    archive = Archive(server.url, hashlib.sha256(server.body).hexdigest(), len(server.body))
    monkeypatch.setattr(cifar, "ARCHIVES", {"cifar10": archive})
    folder = tmp_path / "new"
    found = load("cifar10", str(folder), download=True)
    assert (found.train.images == good.train.images).all()
    assert (found.test.labels == good.test.labels).all()
    (folder / path.name).write_bytes(server.body[:-1] + b"x")
    assert cli.main(["--data", "cifar10", "--data-dir", str(folder), "--download", "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: --download: {folder / path.name}: not what http")
    assert shown.count("\n") == 1


def test_the_published_digests_are_digests() -> None:
    assert set(download.ARCHIVES) == set(cifar.LAYOUTS)
    for name, archive in download.ARCHIVES.items():
        assert archive.url.endswith(cifar.LAYOUTS[name].archive)
        assert len(bytes.fromhex(archive.sha256)) == 32
