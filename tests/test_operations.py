"""Operating the pipeline: a real Prefect server, a real worker, deployments of this folder, real kills."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import flows
from nanodlm.cli import _parse
from nanodlm.config import Config
from nanodlm.stages import NAMES
from tests import servers
from tests.commands import environment, nanodlm, result_of, speeches, tiny_flags

ROOT = Path(flows.__file__).parents[1]
POOL = "default"
CACHED = dict.fromkeys(("download", "tokenizer", "split", "shard"), "Cached")


def config_of(*flags: str) -> dict[str, Any]:
    """The parameter `config` of the settings that flags give."""
    config, _ = _parse("plan", [*tiny_flags(), *flags], {}, configured=True)
    assert isinstance(config, Config)
    return config.model_dump(mode="json")


LONG = config_of("--train.max_steps", "1000000", "--exp.save_every", "20", "--exp.val_rows", "2")


@dataclass
class Site:
    """A Prefect server with the deployments of `prefect.yaml`, a worker, and a store with shards in it."""

    home: Path
    port: int
    clone: Path
    environ: dict[str, str]
    store: Path

    def ask(self, path: str, body: Any = None) -> Any:
        """One request to the server's API."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.environ['PREFECT_API_URL']}/{path}", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def start(self, deployment: str, **parameters: Any) -> str:
        """A new run of a deployment, by its id."""
        found = self.ask(f"deployments/name/{deployment}")
        parameters = {"store": str(self.store), **parameters}
        state = {"type": "SCHEDULED", "state_details": {}}
        return self.ask(f"deployments/{found['id']}/create_flow_run", {"parameters": parameters, "state": state})["id"]

    def state(self, run: str) -> str:
        return self.ask(f"flow_runs/{run}")["state_name"]

    def tasks(self, run: str) -> dict[str, str]:
        """States of a run's tasks, by name."""
        found = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {task["name"]: task["state_name"] for task in found}

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        found = self.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in found}

    def logs(self, run: str) -> list[dict[str, Any]]:
        logs = {"flow_run_id": {"any_": [run]}}
        return self.ask("logs/filter", {"logs": logs, "sort": "TIMESTAMP_ASC", "limit": 200})

    def ends(self, run: str, seconds: float = 120) -> str:
        """The name of the state in which a run ends."""
        final = {"Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "Cached"}
        wait_until(lambda: self.state(run) in final, seconds, lambda: f"{self.state(run)}: {self.said()}")
        return self.state(run)

    def said(self) -> str:
        return (self.home / "worker.log").read_text()[-3000:]

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of Prefect's, in the clone."""
        return subprocess.run(
            [sys.executable, "-m", "prefect", *words],
            cwd=self.clone,
            env=environment(**self.environ),
            capture_output=True,
            text=True,
            timeout=120,
        )

    @contextmanager
    def server(self) -> Iterator[None]:
        with servers.prefect(self.home, self.port):
            yield

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """A worker, ended as `prefect worker` is by a service manager; then with all that it started."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        with servers.running(command, log=self.home / "worker.log", **environment(**self.environ)) as worker:
            try:
                yield worker
            finally:
                for process in below(worker.pid):
                    process.kill()

    def trainer(self, least_step: int) -> psutil.Process:
        """The process that trains, once it has saved so many updates."""
        wait_until(lambda: self.steps() >= least_step, 120, self.said)
        lease = json.loads(next(self.store.glob("train/*/lease.json")).read_text())
        return psutil.Process(lease["pid"])

    def steps(self) -> int:
        """Updates saved."""
        saved = self.store.glob("train/*/attempts/*/parts/checkpoints/step_*.json")
        return max((int(path.stem.removeprefix("step_")) for path in saved), default=0)


def below(pid: int) -> list[psutil.Process]:
    """All processes that one has started, and those that they have."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_until(holds: Callable[[], Any], seconds: float, otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)


def gone(process: psutil.Process, seconds: float = 20) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def prepared(home: Path) -> Path:
    """A store with everything up to the shards of `LONG`."""
    file = home / "config.json"
    file.write_text(json.dumps(LONG))
    result_of(nanodlm("run", str(file), "--store", str(home / "prepared"), "--until", "shard", "--json"))
    return home / "prepared"


@pytest.fixture(scope="module")
def deployed(home: Path) -> Iterator[Site]:
    """A server with everything that `prefect.yaml` deploys, from a clone without a remote."""
    clone = home / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run(["git", "remote", "remove", "origin"], cwd=clone, check=True)
    (port,) = servers.free_ports(1)
    environ = {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(home / "client"),
        "PYTHONPATH": str(clone),
    }
    site = Site(home, port, clone, environ, home / "store")
    with site.server():
        for command in (["work-pool", "create", POOL, "--type", "process"], ["--no-prompt", "deploy", "--all"]):
            done = site.prefect(*command)
            assert done.returncode == 0, done.stdout + done.stderr
        yield site


@pytest.fixture
def site(deployed: Site, prepared: Path, tmp_path: Path) -> Site:
    """The server, and a store of the test's own."""
    store = tmp_path / "store"
    subprocess.run(["cp", "-al", str(prepared), str(store)], check=True)
    return Site(deployed.home, deployed.port, deployed.clone, deployed.environ, store)


@pytest.mark.slow
def test_a_killed_trainer_fails_its_run_and_a_retry_goes_on_from_the_last_checkpoint(site: Site) -> None:
    with site.worker():
        run = site.start("train/gpu", config=LONG, gpu_limit=None)
        trainer = site.trainer(least_step=40)
        trainer.kill()
        assert site.ends(run) == "Failed"
        print(site.tasks(run), site.ask(f"flow_runs/{run}")["state"]["message"], [l["message"] for l in site.logs(run)])
        saved = site.steps()
        done = site.prefect("flow-run", "retry", run)
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until(lambda: site.steps() > saved, 90, site.said)
        print(site.state(run), site.tasks(run))
        trainer = site.trainer(least_step=saved + 20)
        done = site.prefect("flow-run", "cancel", run)
        print(done.stdout)
        print(site.ends(run))
        print(site.tasks(run), site.ask(f"flow_runs/{run}")["state"], [l["message"] for l in site.logs(run)])
        assert gone(trainer)


@pytest.mark.slow
def test_x_sigterm_to_worker(site: Site) -> None:
    with site.worker() as worker:
        run = site.start("train/gpu", config=LONG, gpu_limit=None)
        trainer = site.trainer(least_step=40)
        processes = below(worker.pid)
        print([" ".join(p.cmdline())[:150] for p in processes])
        worker.send_signal(signal.SIGTERM)
        t = time.time()
        assert gone(trainer, 100)
        print("trainer gone", time.time() - t)
        worker.wait(60)
        print("worker gone", time.time() - t)
        time.sleep(5)
        print(site.state(run), site.tasks(run), [p.is_running() for p in processes])
        print(site.said())


@pytest.mark.slow
def test_x_sigkill_flow(site: Site) -> None:
    with site.worker() as worker:
        run = site.start("train/gpu", config=LONG, gpu_limit=None)
        trainer = site.trainer(least_step=40)
        flow = trainer.parent()
        print(" ".join(flow.cmdline())[:150])
        flow.kill()
        t = time.time()
        assert gone(trainer, 100)
        print("trainer gone", time.time() - t)
        print(site.ends(run), time.time() - t)
        print(site.tasks(run), site.ask(f"flow_runs/{run}")["state"])
