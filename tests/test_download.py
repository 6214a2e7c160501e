"""Downloads, from a fake hub on loopback that fails on request."""

import errno
import functools
import hashlib
import http.server
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.data.download import HUB_SETS, Downloader, HubSet, download_shards
from nanochat.dataset import resolve_corpus

TINY = HubSet("tiny", "someone/tiny", 5)


@functools.cache
def shard(index: int, rows: int = 400) -> bytes:
    """A parquet file of about 200 kB that does not compress."""
    texts = [hashlib.shake_128(f"{index}.{i}".encode()).hexdigest(256) for i in range(rows)]
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), out, row_group_size=100)
    return out.getvalue()


class FakeHub:
    """Serves `files` as the hub does: HEAD tells size and hash and redirects to a store that does ranges.

    `faults[name]` is a list of what goes wrong with the next GETs of that file; `heads[name]` likewise with HEADs.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[object]] = defaultdict(list)
        self.heads: dict[str, list[int]] = defaultdict(list)
        self.gets: list[tuple[str, str | None]] = []  # file, Range
        self.tokens: list[tuple[str, str | None]] = []  # path, Authorization
        self.ranges = True
        self.release = threading.Event()
        self.sent_half = threading.Event()
        self.busy = 0
        self.two_busy = threading.Event()  # two requests were served at the same time
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None: ...

            def do_HEAD(self) -> None:
                hub.serve(self, head=True)

            def do_GET(self) -> None:
                hub.serve(self, head=False)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None: ...  # clients that hang up are expected

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, request: http.server.BaseHTTPRequestHandler, head: bool) -> None:
        name = request.path.rsplit("/", 1)[-1]
        self.tokens.append((request.path, request.headers.get("Authorization")))
        if name not in self.files or not re.match(r"/(datasets/[\w-]+/[\w-]+/resolve/main|store)/", request.path):
            return self.answer(request, 404)
        body = self.files[name]
        if not request.path.startswith("/store/"):
            if head and self.heads[name]:
                return self.answer(request, self.heads[name].pop(0))
            return self.answer(
                request,
                302,
                {
                    "Location": f"http://localhost:{self.port}/store/{name}",
                    "X-Repo-Commit": "c" * 40,
                    "X-Linked-Size": str(len(body)),
                    "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"',
                },
            )
        self.gets.append((name, request.headers.get("Range")))
        self.busy += 1
        if self.busy > 1:
            self.two_busy.set()
        try:
            self.send_body(request, body, self.faults[name].pop(0) if self.faults[name] else None)
        finally:
            self.busy -= 1

    def send_body(self, request: http.server.BaseHTTPRequestHandler, body: bytes, fault: object) -> None:
        if isinstance(fault, int):
            return self.answer(request, fault)
        start = 0
        if self.ranges and (match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")):
            start = int(match[1])
            if start >= len(body):
                return self.answer(request, 416)
        rest = body[start:]
        if fault == "corrupt":
            rest = rest[:1000] + b"\0\0\0\0" + rest[1004:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(rest)))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.end_headers()
        if fault == "slow":
            self.two_busy.wait(5)
        if fault in ("truncate", "hang"):
            request.wfile.write(rest[: len(rest) // 2])
            request.wfile.flush()
            self.sent_half.set()
            if fault == "hang":
                self.release.wait(20)
            request.close_connection = True
            return None
        request.wfile.write(rest)
        return None

    def answer(self, request: http.server.BaseHTTPRequestHandler, status: int, headers: object = ()) -> None:
        request.send_response(status)
        for key, value in ({"Content-Length": "0"} | dict(headers)).items():  # type: ignore[call-overload]
            request.send_header(key, value)
        request.end_headers()

    def bodies(self, name: str) -> list[str | None]:
        """The Range headers of all GETs of a file."""
        return [asked for got, asked in self.gets if got == name]


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    huggingface_hub.close_session()
    fake = FakeHub()
    fake.files = {TINY.shard_name(i): shard(i) for i in range(6)}
    yield fake
    fake.release.set()
    huggingface_hub.close_session()
    fake.server.shutdown()
    fake.server.server_close()


def get(hub: FakeHub, base: Path, count: int = 2, **settings: object) -> list[Path]:
    return download_shards(TINY, count, base, **{"endpoint": hub.url, "delay_seconds": 0.01, **settings})  # type: ignore[arg-type]


def fetch(hub: FakeHub, base: Path, name: str, **settings: object) -> Path:
    folder = base / "base_data" / "tiny"
    Downloader(TINY, folder, hub.url, **{"delay_seconds": 0.01, **settings}).fetch(name)  # type: ignore[arg-type]
    return folder / name


def leftovers(base: Path) -> list[str]:
    return [p.name for p in (base / "base_data" / "tiny").iterdir() if p.is_file() and not p.name.startswith("shard")]


def test_shards_and_the_validation_shard_arrive(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    paths = get(hub, tmp_path, 3)
    assert [path.name for path in paths] == [TINY.shard_name(i) for i in (5, 0, 1, 2)]
    assert all(path.read_bytes() == hub.files[path.name] for path in paths) and not leftovers(tmp_path)
    assert hub.gets[0][0] == TINY.val_name
    get(hub, tmp_path, 3)
    assert len(hub.gets) == 4  # what is there is not asked for again
    monkeypatch.setitem(dataset.HUB_SETS, "tiny", TINY)
    corpus = resolve_corpus("tiny", tmp_path)
    assert len(list(corpus.iter_documents("train"))) == 1200 and corpus.num_row_groups("val") == 4


def test_workers_download_at_the_same_time(hub: FakeHub, tmp_path: Path) -> None:
    for i in range(4):
        hub.faults[TINY.shard_name(i)] = ["slow"]
    get(hub, tmp_path, 4, workers=4)
    assert hub.two_busy.is_set()


def test_a_cut_connection_is_continued(hub: FakeHub, tmp_path: Path) -> None:
    name = TINY.shard_name(0)
    hub.faults[name] = ["truncate", 503, "truncate"]
    path = fetch(hub, tmp_path, name)
    size, asked = len(hub.files[name]), hub.bodies(name)
    assert asked[:3] == [None, f"bytes={size // 2}-", f"bytes={size // 2}-"]
    assert asked[3] == f"bytes={size // 2 + (size - size // 2) // 2}-"
    assert path.read_bytes() == hub.files[name] and not leftovers(tmp_path)


def test_a_later_run_continues(hub: FakeHub, tmp_path: Path) -> None:
    name = TINY.shard_name(0)
    hub.faults[name] = ["truncate", 500, 500]
    with pytest.raises(UserError, match=r"shard_00000"):
        fetch(hub, tmp_path, name, attempts=2)
    assert not (tmp_path / "base_data" / "tiny" / name).exists()
    path = fetch(hub, tmp_path, name)
    assert hub.bodies(name)[-1] == f"bytes={len(hub.files[name]) // 2}-"
    assert path.read_bytes() == hub.files[name]


def test_a_part_of_another_version_is_not_continued(hub: FakeHub, tmp_path: Path) -> None:
    name = TINY.shard_name(0)
    hub.faults[name] = ["truncate", 500]
    with pytest.raises(UserError):
        fetch(hub, tmp_path, name, attempts=1)
    hub.files[name] = shard(77)
    hub.faults[name] = []
    assert fetch(hub, tmp_path, name).read_bytes() == hub.files[name]
    assert hub.bodies(name)[-1] is None and not leftovers(tmp_path)


def test_a_server_without_ranges_starts_over(hub: FakeHub, tmp_path: Path) -> None:
    name = TINY.shard_name(0)
    hub.ranges = False
    hub.faults[name] = ["truncate"]
    assert fetch(hub, tmp_path, name).read_bytes() == hub.files[name]


def test_wrong_bytes_are_noticed_and_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    name = TINY.shard_name(0)
    hub.faults[name] = ["corrupt"]
    assert fetch(hub, tmp_path, name).read_bytes() == hub.files[name]
    assert hub.bodies(name) == [None, None]
    hub.faults[TINY.shard_name(1)] = ["corrupt"] * 9
    with pytest.raises(UserError, match="SHA-256"):
        fetch(hub, tmp_path, TINY.shard_name(1), attempts=3)
    assert not leftovers(tmp_path)


def test_what_is_not_parquet_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.files[TINY.shard_name(0)] = b"<html>log in to the hotel's wifi</html>"
    with pytest.raises(UserError, match=r"shard_00000.*parquet"):
        fetch(hub, tmp_path, TINY.shard_name(0), attempts=2)
    assert not list((tmp_path / "base_data" / "tiny").glob("shard*"))


def test_server_failures_are_retried_with_growing_delays(hub: FakeHub, tmp_path: Path, monkeypatch, capsys) -> None:
    name = TINY.shard_name(0)
    hub.heads[name] = [503, 429]
    hub.faults[name] = [500, 503]
    waits: list[float] = []
    monkeypatch.setattr(Downloader, "pause", lambda self, seconds: waits.append(seconds) if seconds else None)
    Downloader(TINY, tmp_path, hub.url, delay_seconds=1).fetch(name)
    assert len(waits) == 4 and all(0.75 * 2**i <= seconds <= 1.25 * 2**i for i, seconds in enumerate(waits))
    assert capsys.readouterr().err.count(name) == 4


@pytest.mark.parametrize(("status", "words"), [(404, "404"), (401, "hf auth login"), (403, "hf auth login")])
def test_final_refusals_are_not_retried(status: int, words: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.heads[TINY.val_name] = [status] * 2
    with pytest.raises(UserError, match=words) as caught:
        get(hub, tmp_path)
    assert f"127.0.0.1:{hub.port}" in str(caught.value) and "\n" not in str(caught.value)
    assert len(hub.heads[TINY.val_name]) == 1 and not hub.gets


def test_one_failing_shard_stops_the_others_and_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults[TINY.shard_name(1)] = [404] * 9
    with pytest.raises(UserError, match=r"shard_00001.*404"):
        get(hub, tmp_path, 5, workers=1)
    assert {name for name, _ in hub.gets} == {TINY.val_name, TINY.shard_name(0), TINY.shard_name(1)}


def test_a_damaged_shard_on_disk_is_replaced(hub: FakeHub, tmp_path: Path) -> None:
    path = fetch(hub, tmp_path, TINY.shard_name(0))
    path.write_bytes(path.read_bytes()[:5000])
    assert fetch(hub, tmp_path, TINY.shard_name(0)).read_bytes() == hub.files[TINY.shard_name(0)]


def test_the_token_goes_to_the_hub_only(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, tmp_path, TINY.shard_name(0))
    for path, token in hub.tokens:
        assert token == (None if path.startswith("/store") else "Bearer hf_secret"), path


def test_no_network_names_the_host_and_the_way_out(tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9 .*--data starter"):
        download_shards(TINY, 1, tmp_path, endpoint="http://127.0.0.1:9", delay_seconds=0.01)
    assert capsys.readouterr().err.count(TINY.val_name) == 2


def test_the_offline_switch_is_named(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        get(hub, tmp_path)


# ---------------------------------------------------------------------------------------------------
# python -m nanochat.dataset


def start(base: Path, hub: FakeHub, *words: str) -> subprocess.Popen[str]:
    environ = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {"NANOCHAT_BASE_DIR": str(base)}
    command = [sys.executable, "-m", "nanochat.dataset", *words, "--endpoint", hub.url]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_the_work_and_one_that_is_killed_is_taken_over(hub: FakeHub, tmp_path: Path) -> None:
    fineweb = HUB_SETS["fineweb-edu"]
    hub.files = {fineweb.shard_name(i): shard(i) for i in (0, 1)} | {fineweb.val_name: shard(2)}
    hub.faults[fineweb.val_name] = ["hang"]
    first = start(tmp_path, hub, "-n", "2")
    assert hub.sent_half.wait(30)
    folder = tmp_path / "base_data" / "fineweb-edu"
    while not any(part.stat().st_size for part in folder.glob(".*.part")):
        time.sleep(0.01)
    others = [start(tmp_path, hub, "-n", "2") for _ in range(2)]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    for job in others:
        out, err = job.communicate(timeout=60)
        assert job.returncode == 0 and "3 shards of fineweb-edu" in out, err
    asked = hub.bodies(fineweb.val_name)
    assert asked[0] is None and str(asked[1]).startswith("bytes=") and len(hub.gets) == 4
    assert sorted(p.name for p in folder.glob("*.parquet")) == sorted(hub.files)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "-n"),
        (["-n", "0"], "1822"),
        (["-n", "many"], "many"),
        (["-n", "2", "-w", "0"], "-w"),
        (["-n", "2", "--set", "wikipedia"], "fineweb-edu"),
        (["-n", "2", "--shards"], "--shards"),
        (["-n", "2", "--endpoint", "http://[nowhere"], "--endpoint"),
    ],
)
def test_command_line_mistakes(words: list[str], expected: str, capsys) -> None:
    assert dataset.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error


def test_a_full_disk_is_exit_code_1(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(dataset, "download_shards", refuse)
    assert dataset.main(["-n", "1"]) == 1 and "No space left" in capsys.readouterr().err


def test_the_command_downloads(hub: FakeHub, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    climbmix = HUB_SETS["climbmix"]
    hub.files = {climbmix.shard_name(0): shard(0), climbmix.val_name: shard(1)}
    assert dataset.main(["--", "-n", "1", "--set", "climbmix", "--endpoint", hub.url]) == 0
    assert "--data climbmix" in capsys.readouterr().out
    assert resolve_corpus("", tmp_path).name == "climbmix"
