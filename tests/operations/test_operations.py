"""Operating the pipeline: a real Prefect server, a real worker, deployments of this folder, real kills."""

import html
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

import flows
from nanodlm.cli.arguments import Settings, parse
from nanodlm.config import Config
from nanodlm.stages.table import NAMES
from tests.support import servers
from tests.support.commands import environment, nanodlm, result_of, tiny_flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # whole servers and workers
ROOT = Path(flows.__file__).parents[1]
POOL = "default"
OF_DEMO = {"deployments": {"name": {"any_": ["demo"]}}}  # the scheduler makes runs of others meanwhile
CACHED = dict.fromkeys(("download", "tokenizer", "split", "shard"), "Cached")


def config_of(*flags: str) -> dict[str, Any]:
    """The parameter `config` of the settings that flags give."""
    given: list[Config] = []

    def keep(config: Settings) -> None:
        given.append(config)

    parse("plan", keep, [*tiny_flags(), *flags])()
    return given[0].model_dump(mode="json")


SHORT = config_of()
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
        with urllib.request.urlopen(request, timeout=120) as answer:
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
        """The last states of the tasks of a run that has ended, by name; the server hears of them apart from its."""

        def states() -> dict[str, str]:
            found = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
            return {task["name"]: task["state_name"] for task in found}

        wait_until(lambda: not {"Pending", "Running"} & set(states().values()), 20, lambda: str(states()))
        return states()

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

    def taken(self) -> int:
        """Places of `gpu` that are taken."""
        return self.ask("v2/concurrency_limits/gpu")["active_slots"]

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

    def deploy(self) -> None:
        """A pool, and everything in `prefect.yaml`."""
        for command in (["work-pool", "create", POOL, "--type", "process"], ["--no-prompt", "deploy", "--all"]):
            done = self.prefect(*command)
            assert done.returncode == 0, done.stdout + done.stderr
        away = float(os.environ.get("OUTAGE_SECONDS", "0"))  # for which a server that comes back takes runs for lost
        done = nanodlm("automate", "--lost-after", f"{away + 90:.0f}s", **self.environ)
        assert done.returncode == 0, done.stderr

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

    def updates_shown(self, run: str) -> list[int]:
        """Numbers of updates in a run's log."""
        lines = [log["message"] for log in self.logs(run) if " updates, loss " in log["message"]]
        return [int(line.split("/")[0].replace(",", "")) for line in lines]


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
        site.deploy()
        yield site


@pytest.fixture
def site(deployed: Site, prepared: Path, tmp_path: Path) -> Site:
    """The server, and a store of the test's own."""
    store = tmp_path / "store"
    subprocess.run(["cp", "-al", str(prepared), str(store)], check=True)
    return Site(deployed.home, deployed.port, deployed.clone, deployed.environ, store)


def test_prefect_deploys_everything_from_a_clone_without_a_remote(deployed: Site) -> None:
    found = {f"{d['flow_name']}/{d['name']}": d for d in _deployments(deployed)}
    assert set(found) == {
        "pipeline/demo",
        "pipeline/nightly",
        "prepare/default",
        "train/gpu",
        "evaluate/default",
        "sample/default",
        "gc/weekly",
    }
    for deployment in found.values():
        step = deployment["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]
        assert step["directory"] == str(deployed.clone)
        assert "nanodlm" in deployment["tags"]
    (nightly,) = found["pipeline/nightly"]["schedules"]
    assert (nightly["schedule"]["cron"], nightly["schedule"]["timezone"]) == ("0 2 * * *", "Europe/Berlin")


def _deployments(site: Site) -> list[dict[str, Any]]:
    flows_ = {flow["id"]: flow["name"] for flow in site.ask("flows/filter", {})}
    return [{**d, "flow_name": flows_[d["flow_id"]]} for d in site.ask("deployments/filter", {})]


def test_the_form_of_a_run_shows_groups_descriptions_bounds_and_choices(deployed: Site) -> None:
    schema = deployed.ask("deployments/name/train/gpu")["parameter_openapi_schema"]
    assert schema["properties"]["config"]["description"] == "Every setting of the run."
    groups = schema["definitions"]["Config"]["properties"]
    assert set(groups) == {"data", "model", "schedule", "objective", "train", "eval", "sample", "exp"}
    lr = schema["definitions"]["TrainConfig"]["properties"]["lr"]
    assert lr["exclusiveMinimum"] == 0
    assert lr["description"]
    assert schema["definitions"]["ObjectiveConfig"]["properties"]["kind"]["enum"][0] == "absorbing"


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"config": {"train": {"lr": -1}}}, "config.train.lr"),
        ({"config": {"trian": {"lr": 1}}}, "trian"),
        ({"config": {"data": {"tokenizer": "words"}}}, "config.data.tokenizer"),
        ({"until": "training"}, "until"),
        ({"store": "s3://key:secret@bucket/store"}, "store"),
    ],
)
def test_a_bad_parameter_is_refused_before_a_run_is_scheduled(
    deployed: Site, parameters: dict[str, Any], names: str
) -> None:
    before = deployed.ask("flow_runs/count", OF_DEMO)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        deployed.start("pipeline/demo", **parameters)
    with refusal.value as answer:
        assert answer.code == 409
        assert names in json.load(answer)["detail"]
    assert deployed.ask("flow_runs/count", OF_DEMO) == before


def test_the_command_line_refuses_a_parameter_that_the_flow_does_not_have(deployed: Site) -> None:
    before = deployed.ask("flow_runs/count", OF_DEMO)
    done = deployed.prefect("deployment", "run", "pipeline/demo", "--param", "learning_rate=1")
    assert done.returncode == 1
    assert "learning_rate" in done.stdout + done.stderr
    assert deployed.ask("flow_runs/count", OF_DEMO) == before


def test_a_run_on_a_worker_shows_its_progress_counts_curve_samples_and_report(site: Site) -> None:
    with site.worker():
        run = site.start("pipeline/demo", config=SHORT)
        assert site.ends(run) == "Completed"
        assert site.tasks(run) == CACHED | dict.fromkeys(("train", "evaluate", "sample", "report"), "Completed")
        name = site.ask(f"flow_runs/{run}")["name"]
        assert name.startswith("custom-")
        assert len(name) == len("custom-12345678")
        tasks = site.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        assert {task["name"]: task["tags"] for task in tasks} == {n: [n] for n in (*NAMES, "report")}

        shown = site.artifacts(run)
        assert {"train-progress", "evaluate-progress", "data-counts", "loss-curve", "samples", "report"} <= set(shown)
        assert shown["train-progress"]["data"] == 100
        table = json.loads(shown["data-counts"]["data"])
        assert [row["stage"] for row in table] == ["download", "tokenizer", "split", "shard", "train", "validation"]
        assert next(site.store.glob("report/*/attempts/*/report.html")).as_uri() in shown["report-page"]["data"]

        # The pages themselves, in a browser.
        texts = next(site.store.glob("sample/*/attempts/*/samples.jsonl")).read_text().splitlines()
        words = max(json.loads(texts[0])["text"].split(), key=len)
        page = f"http://127.0.0.1:{site.port}"
        for path, expected in {
            f"runs/flow-run/{run}": [name, "Completed", "nanodlm", "8 Task runs"],
            f"artifacts/artifact/{shown['train-progress']['id']}": ["train-progress", "updates", "tokens/s"],
            f"artifacts/artifact/{shown['data-counts']['id']}": ["data-counts", "training rows"],
            f"artifacts/artifact/{shown['loss-curve']['id']}": ["loss-curve", '<img src="data:image/svg+xml;base64,'],
            f"artifacts/artifact/{shown['samples']['id']}": ["samples", html.escape(words)],
            f"artifacts/artifact/{shown['report']['id']}": ["validation bound", "bits per byte", "unigram entropy"],
        }.items():
            content = browse(f"{page}/{path}")
            for text in expected:
                assert text in content, (path, text)

        again = site.start("pipeline/demo", config=SHORT)
        assert site.ends(again) == "Completed"
        assert set(site.tasks(again).values()) == {"Cached"}
        alone = site.start("sample/default", config=SHORT, rebuild=True, gpu_limit=None)
        assert site.ends(alone) == "Completed"
        assert site.tasks(alone) == CACHED | {"train": "Cached", "sample": "Completed"}
        missing = site.start("evaluate/default", config=LONG, gpu_limit=None)
        assert site.ends(missing) == "Failed"
        assert "train is not built" in site.ask(f"flow_runs/{missing}")["state"]["message"]


def browse(url: str) -> str:
    """A page's elements, after its scripts have run."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no browser to look at pages with: apt-get install chromium"
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout


def test_a_killed_trainer_fails_its_run_a_retry_goes_on_and_a_cancellation_saves(site: Site) -> None:
    with site.worker():
        run = site.start("train/gpu", config=LONG, gpu_limit=None)
        trainer = site.trainer(least_step=40)
        trainer.kill()
        assert site.ends(run) == "Failed"
        message = site.ask(f"flow_runs/{run}")["state"]["message"]
        assert message.endswith("the train process ended with signal 9; run again to continue")
        assert site.tasks(run) == CACHED | {"train": "Failed"}

        saved = site.steps()
        done = site.prefect("flow-run", "retry", run)
        assert done.returncode == 0, done.stdout + done.stderr
        trainer = site.trainer(least_step=saved + 20)
        wait_until(lambda: len(site.updates_shown(run)) == 2, 60, site.said)
        assert site.updates_shown(run)[1] > saved  # it did not begin anew

        done = site.prefect("flow-run", "cancel", run)
        assert done.returncode == 0, done.stdout + done.stderr
        assert site.ends(run) == "Cancelled"
        assert gone(trainer)
        assert site.steps() > saved


def test_a_worker_told_to_stop_leaves_no_process_and_its_run_is_found_crashed(site: Site) -> None:
    with site.worker() as worker:
        run = site.start("train/gpu", config=LONG, gpu_limit=None)
        trainer = site.trainer(least_step=40)
        started = below(worker.pid)
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
        assert gone(trainer)
        assert not [process for process in started if process.is_running()]
    assert site.ends(run, 300) == "Crashed"  # by the automation on lost heartbeats


def test_a_killed_flow_is_reported_as_crashed_its_trainer_saves_and_another_run_goes_on(site: Site) -> None:
    with site.worker():
        run = site.start("train/gpu", config=LONG, gpu_limit=None)
        trainer = site.trainer(least_step=40)
        before = site.steps()
        flow = trainer.parent()
        assert flow is not None
        flow.kill()
        assert gone(trainer)
        assert site.ends(run, 30) == "Crashed"
        saved = site.steps()
        assert saved >= before
        again = site.start("train/gpu", config=LONG, gpu_limit=None)
        wait_until(lambda: site.updates_shown(again), 60, site.said)
        assert site.updates_shown(again)[0] > saved  # it did not begin anew
        site.prefect("flow-run", "cancel", again)
        assert site.ends(again) == "Cancelled"


@pytest.fixture
def alone(site: Site, tmp_path: Path) -> Iterator[tuple[Site, ExitStack]]:
    """A site whose server can be taken away, by closing the stack."""
    (port,) = servers.free_ports(1)
    environ = {**site.environ, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    site = replace(site, port=port, home=tmp_path, environ=environ)
    with ExitStack() as server:
        server.enter_context(site.server())
        site.deploy()
        with site.worker():
            yield site, server


@pytest.mark.timeout(3600)
def test_training_goes_on_while_the_server_is_away_and_ends_well(alone: tuple[Site, ExitStack]) -> None:
    site, server = alone
    away = float(os.environ.get("OUTAGE_SECONDS", "20"))
    config = config_of("--train.max_steps", str(int(200 * (away + 60))), "--exp.save_every", "500")
    run = site.start("train/gpu", config=config)
    trainer = site.trainer(least_step=500)
    server.close()
    before = site.steps()
    time.sleep(away)
    assert trainer.is_running()
    assert before < site.steps() < config["train"]["max_steps"]
    server.enter_context(site.server())
    assert site.state(run) == "Running"
    assert site.taken() == 1  # so nobody else takes the device
    assert site.ends(run, 1800) == "Completed"
    assert site.taken() == 0
    assert site.tasks(run) == CACHED | {"train": "Completed"}
    # The log has a line of progress every 30 s, and never more.
    lines = [log for log in site.logs(run) if " updates, loss " in log["message"]]
    times = [datetime.fromisoformat(line["timestamp"]).timestamp() for line in lines]
    assert len(times) >= 2
    assert all(later - earlier >= 29 for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("state", ["Completed", "Failed"])
def test_a_run_that_ends_while_the_server_is_away_is_told_how_when_it_is_back(
    alone: tuple[Site, ExitStack], state: str
) -> None:
    site, server = alone
    run = site.start("train/gpu", config=LONG if state == "Failed" else config_of("--train.max_steps", "1000"))
    trainer = site.trainer(least_step=20)
    server.close()
    if state == "Failed":
        trainer.kill()
    else:
        wait_until(lambda: list(site.store.glob("train/*/manifest.json")), 120, site.said)
    wait_until(lambda: "the Prefect server is away: waiting to tell it" in site.said(), 60, site.said)
    time.sleep(20)  # longer than Prefect tries to tell how a task ended
    server.enter_context(site.server())
    assert site.ends(run, 300) == state
    assert site.tasks(run) == CACHED | {"train": state}


def test_runs_that_share_a_device_train_one_after_the_other_and_need_its_limit_to_exist(site: Site) -> None:
    with site.worker():
        without = site.start("train/gpu", config=SHORT, gpu_limit="no-such-device")
        assert site.ends(without) == "Failed"
        message = site.ask(f"flow_runs/{without}")["state"]["message"]
        assert "the Prefect server has no concurrency limit 'no-such-device': run `prefect gcl create" in message
        runs = [
            site.start("train/gpu", config={**SHORT, "train": {**SHORT["train"], "seed": seed, "max_steps": 3000}})
            for seed in (1, 2)
        ]
        most = 0
        while any(site.state(run) not in ("Completed", "Failed", "Crashed") for run in runs):
            most = max(most, sum("nanodlm train" in " ".join(p.cmdline()) for p in trainers(site)))
            time.sleep(0.1)
        assert [site.state(run) for run in runs] == ["Completed", "Completed"]
        assert most == 1


def test_a_run_that_is_cancelled_while_it_waits_for_the_device_takes_no_place(site: Site) -> None:
    with site.worker():
        holder = site.start("train/gpu", config=LONG)
        site.trainer(least_step=20)
        waiter = site.start("train/gpu", config=SHORT)
        wait_until(lambda: any("asking for a place" in log["message"] for log in site.logs(waiter)), 120, site.said)
        for run in (waiter, holder):
            assert site.prefect("flow-run", "cancel", run).returncode == 0
            assert site.ends(run) == "Cancelled"
        wait_until(lambda: site.taken() == 0, 20, site.said)
        time.sleep(10)
        assert site.taken() == 0


def trainers(site: Site) -> list[psutil.Process]:
    """Processes that train into this store."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and str(site.store) in words:
            found.append(process)
    return found
