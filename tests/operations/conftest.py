"""One whole Prefect server for all tests of operations: closed to others, with a store, deployments and a worker."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

import nanodlm
from nanodlm.cli.arguments import parse
from nanodlm.cli.run import plan
from nanodlm.config import Config
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import until
from nanodlm.store import Store
from tests.support import servers
from tests.support.commands import environment, tiny_flags

ROOT = Path(nanodlm.__file__).parents[1]
AUTH = "operator:planted-password-of-the-server"
SERVER = {
    "PREFECT_SERVER_API_AUTH_STRING": AUTH,
    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
}
FINAL = {"Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "Cached"}


def config_of(*flags: str) -> dict[str, Any]:
    """Return the parameter `config` of the settings that flags give."""
    call: Any = parse("plan", plan, [*tiny_flags(), *flags])
    return call.keywords["config"].model_dump(mode="json")


SHORT = config_of()
LONG = config_of("--train.max_steps", "1000000", "--exp.save_every", "20", "--exp.val_rows", "2")


def wait_until(holds: Callable[[], Any], seconds: float = 240, otherwise: Callable[[], str] = lambda: "") -> Any:
    """Return what a condition gives as soon as it holds."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)
    return value


@dataclass
class Site:
    """A Prefect server, what `prefect.yaml` deploys on it, a worker as soon as it is asked for, and a store."""

    home: Path
    clone: Path
    environ: dict[str, str]  # of those who use the server
    stack: ExitStack
    store: Path = Path()
    worker: subprocess.Popen[bytes] | None = None

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.environ["PREFECT_API_URL"], auth_string=AUTH)

    def ask(self, path: str, body: Any = None) -> Any:
        """Make one request to the server's API."""
        with self.client() as client:
            return client.request("GET" if body is None else "POST", path, json=body).json()  # type: ignore[arg-type]

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Prefect's in the clone."""
        return subprocess.run(
            [sys.executable, "-m", "prefect", *words],
            cwd=self.clone,
            env=environment(**self.environ),
            capture_output=True,
            text=True,
            timeout=200,
        )

    def succeeds(self, *words: str) -> None:
        done = self.prefect(*words)
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self) -> None:
        """Do what the README does: a pool, everything in `prefect.yaml`, and no limit."""
        self.succeeds("work-pool", "create", "default", "--type", "process")
        self.succeeds("--no-prompt", "deploy", "--all")

    def work(self) -> subprocess.Popen[bytes]:
        """Return the worker, started anew where there is none or it has ended."""
        if self.worker is None or self.worker.poll() is not None:
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "default", "--type", "process"]
            running = servers.running(command, log=self.home / "worker.log", **environment(**self.environ))
            self.worker = self.stack.enter_context(running)
            self.stack.callback(kill_below, self.worker.pid)
        return self.worker

    def start(self, deployment: str, **parameters: Any) -> str:
        """Start a run of a deployment on the worker, and return its id."""
        self.work()
        found = self.ask(f"/deployments/name/{deployment}")
        body = {"parameters": {"store": str(self.store), **parameters}, "state": {"type": "SCHEDULED"}}
        return self.ask(f"/deployments/{found['id']}/create_flow_run", body)["id"]

    def cancel(self, run: str) -> None:
        self.succeeds("flow-run", "cancel", run)
        assert self.ends(run) == "Cancelled"

    def state(self, run: str, what: str = "name") -> str:
        """Return the name of a run's state, or its message."""
        return self.ask(f"/flow_runs/{run}")["state"][what]

    def ends(self, run: str, seconds: float = 240) -> str:
        """Return the name of the state in which a run ends."""
        wait_until(lambda: self.state(run) in FINAL, seconds, lambda: f"{self.state(run)}: {self.log()}")
        return self.state(run)

    def tasks(self, run: str) -> dict[str, str]:
        """Return the last states of the tasks of a run that has ended; the server hears of them apart from its."""

        def states() -> dict[str, str]:
            found = self.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
            return {task["name"]: task["state_name"] for task in found}

        return wait_until(lambda: not {"Pending", "Running"} & set(states().values()) and states(), 20)

    def lines(self, run: str, containing: str = "") -> list[dict[str, Any]]:
        """Return what the server's log has of a run."""
        logs = self.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"})
        return [log for log in logs if containing in log["message"]]

    def taken(self) -> int:
        """Return how many slots of `gpu` are taken."""
        return self.ask("/v2/concurrency_limits/gpu")["active_slots"]

    def log(self) -> str:
        return (self.home / "worker.log").read_text()[-3000:]

    def trainer(self, least_step: int) -> psutil.Process:
        """Return the process that trains, once it has saved so many updates."""
        wait_until(lambda: self.steps() >= least_step, otherwise=self.log)
        (lease,) = wait_until(lambda: list(self.store.glob("train/*/lease.json")), otherwise=self.log)
        return psutil.Process(json.loads(lease.read_text())["pid"])

    def steps(self) -> int:
        """Return how many updates are saved."""
        saved = self.store.glob("train/*/attempts/*/parts/checkpoints/step_*.json")
        return max((int(path.stem.removeprefix("step_")) for path in saved), default=0)


def kill_below(pid: int) -> None:
    """Kill all that a process has started and that has not ended."""
    for process in below(pid):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def below(pid: int) -> list[psutil.Process]:
    """Return all processes that one has started, and those that they have."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def new_site(home: Path, clone: Path, **server: str) -> Iterator[Site]:
    """Start a server, beside a clone of this folder without a remote, as somebody may have who only got the files."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run(["git", "remote", "remove", "origin"], cwd=clone, check=True)
    with ExitStack() as stack:
        named = stack.enter_context(servers.prefect(home, **server))
        more = {"PREFECT_API_AUTH_STRING": server.get("PREFECT_SERVER_API_AUTH_STRING", ""), "PYTHONPATH": str(clone)}
        yield Site(home, clone, {**named, **more}, stack)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server on which nothing is deployed yet."""
    with new_site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("clone"), **SERVER) as site:
        yield site


@pytest.fixture(scope="session")
def deployed(whole: Site) -> Site:
    whole.deploy()
    return whole


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything up to the shards of `LONG`."""
    store = Store(str(tmp_path_factory.mktemp("prepared")))
    for name in until("shard"):
        run_stage(name, Config.model_validate(LONG), store)
    return Path(store.root)


@pytest.fixture
def site(deployed: Site, prepared: Path, tmp_path: Path) -> Site:
    """The server, with a store of the test's own."""
    deployed.store = tmp_path / "store"
    subprocess.run(["cp", "-al", str(prepared), str(deployed.store)], check=True)
    return deployed
