"""Shards as tasks on real workers: threads, processes, a Dask cluster; killed for real."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import fsspec
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

from nanodlm.errors import UsageError
from nanodlm.flows.shards import task_runner
from nanodlm.stages import run as stages_run
from nanodlm.store import Store
from nanodlm.upkeep import copy
from tests.support import servers
from tests.support.commands import nanodlm, result_of, started
from tests.support.helpers import prose, tiny_config

PARTS = 8


class Prepared:
    """A store that lacks the shards, and the digest that they have when the stage makes them alone."""

    def __init__(self, folder: Path):
        source, self.url = folder / "text.txt", str(folder / "store")
        source.write_text("\n".join(prose(2600)))
        self.config = tiny_config(str(source), part_mb=0.05, sample_by="line")
        store = Store(self.url)
        for name in ("download", "tokenizer", "split"):
            stages_run.run_stage(name, self.config, store)
        copytree(self.url, folder / "alone")
        self.digest = stages_run.run_stage("shard", self.config, Store(str(folder / "alone")))[0].digest
        settings = folder / "config.json"
        settings.write_text(self.config.model_dump_json())
        self.settings = str(settings)

    def arguments(self, store: Path | str, *more: str) -> tuple[str, ...]:
        return ("run", self.settings, "--store", str(store), "--until", "shard", "--json", *more)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("prepared"))


def digest_of(result: dict[str, Any]) -> str:
    uri = result["stages"][-1]["uri"]
    return json.loads((Path(uri) / "manifest.json").read_text())["digest"]


def finished(store: Path) -> dict[str, list[str]]:
    """Names of the finished shards, each with the attempts that have it."""
    found: dict[str, list[str]] = {}
    for path in sorted(store.glob("shard/*/attempts/*/parts/*.json")):
        found.setdefault(path.stem, []).append(path.parts[-3])
    return found


def shard_tasks(server: dict[str, str], store: Path | str) -> dict[str, dict[str, Any]]:
    """Return the task runs of the shards of a store, by name, as the server shows them."""
    with SyncPrefectClient(server["PREFECT_API_URL"]) as client:
        body: dict[str, Any] = {"flow_runs": {"name": {"any_": [str(store)]}}}
        ids = [run["id"] for run in client.request("POST", "/flow_runs/filter", json=body).json()]
        body = {"task_runs": {"flow_run_id": {"any_": ids}}, "sort": "EXPECTED_START_TIME_ASC"}  # the newest wins
        tasks = client.request("POST", "/task_runs/filter", json=body).json() if ids else []
    return {task["name"]: task for task in tasks}


def until(condition: Callable[[], object], process: Any) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["threads", "processes", "dask"])
def test_a_run_killed_while_shards_are_made_leaves_no_process_and_another_makes_each_missing_one_once(
    runner: str, prepared: Prepared, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    copytree(prepared.url, store)
    arguments = prepared.arguments(store, "--runner", runner, "--workers", "2")
    with started(*arguments, **prefect_server) as process:
        until(lambda: len(finished(store)) >= 2, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    assert psutil.wait_procs(workers, 30)[1] == []
    before = finished(store)
    assert not list(store.glob("shard/*/manifest.json"))
    assert 2 <= len(before) < PARTS
    done = nanodlm(*arguments, **prefect_server)
    assert digest_of(result_of(done)) == prepared.digest
    assert "left to the stage" not in done.stderr
    stage = {path.parent.name for path in store.glob("shard/*/attempts/*/validation.arrayrecord")}
    after = {name: set(attempts) - stage for name, attempts in finished(store).items()}
    assert all(after[name] == set(attempts) for name, attempts in before.items())
    assert [len(attempts) for attempts in after.values()] == [1] * len(after)
    tasks = shard_tasks(prefect_server, store)
    missing = {f"shard-{i}" for i, name in enumerate(sorted(after)) if name not in before}
    assert {name for name, task in tasks.items() if task["state_name"] == "Completed"} >= missing


@pytest.mark.slow
def test_a_cluster_that_is_there_already_is_used_and_outlives_the_kill_of_a_worker(
    prepared: Prepared, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    copytree(prepared.url, store)
    with servers.dask(2) as (address, workers):
        named = {"NANODLM_DASK_ADDRESS": address, **prefect_server}
        with started(*prepared.arguments(store, "--runner", "dask"), **named) as process:
            until(lambda: len(finished(store)) >= 1, process)
            before = finished(store)
            workers[0].send_signal(signal.SIGKILL)
            said, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert workers[1].poll() is None
    assert json.loads(said.splitlines()[-1])["stages"][-1]["status"] == "built"
    assert digest_of(json.loads(said.splitlines()[-1])) == prepared.digest
    after = finished(store)
    assert all(set(attempts) <= set(after[name]) for name, attempts in before.items())


@pytest.mark.slow
def test_a_shard_whose_requests_fail_is_tried_again_later(
    prepared: Prepared, prefect_server: dict[str, str], s3_environment: None, moto_server: servers.Server
) -> None:
    fsspec.filesystem("s3").mkdir("retried")
    url = "s3://retried/store"
    list(copy.copy(Store(prepared.url), Store(url), list(Store(prepared.url)), lambda *_, **__: None))
    back = threading.Event()

    def fail(method: str, path: str) -> str:
        return "busy" if method == "PUT" and "train-00002" in path and not back.is_set() else ""

    with servers.flaky(moto_server, fail) as wire:
        named = {**wire.environ, **prefect_server, "NANODLM_RETRY_SECONDS": "0.1"}
        with started(*prepared.arguments(url, "--runner", "threads", "--workers", "2"), **named) as process:

            def waits() -> bool:
                time.sleep(0.2)
                task = shard_tasks(prefect_server, url).get("shard-2")
                return bool(task and task["state_name"] == "AwaitingRetry")

            until(waits, process)
            back.set()
            said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert json.loads(said.splitlines()[-1])["stages"][-1]["status"] == "built"
    assert "left to the stage" not in errors
    task = shard_tasks(prefect_server, url)["shard-2"]
    assert (task["state_name"], task["run_count"] > 1) == ("Completed", True)
    found = [Store(url).find(*item) for item in Store(url)]
    assert prepared.digest in [artifact.digest for artifact in found if artifact]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NANODLM_RUNNER", "spark", "unknown runner 'spark': choose one of threads, processes, dask"),
        ("NANODLM_WORKERS", "0", "counts tasks at a time, from 1, not 0"),
    ],
)
def test_a_runner_that_cannot_be_is_one_clear_line(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        task_runner()


def test_a_runner_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANODLM_RUNNER", "dask")
    monkeypatch.setitem(sys.modules, "prefect_dask.task_runners", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[dask\]'"):
        task_runner()


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_one_line(
    prepared: Prepared, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    copytree(prepared.url, tmp_path / "store")
    named = {"NANODLM_DASK_ADDRESS": "tcp://127.0.0.1:9", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    done = nanodlm(*prepared.arguments(tmp_path / "store", "--runner", "dask"), **named, **prefect_server)
    assert done.returncode == 1
    assert "NANODLM_DASK_ADDRESS" in done.stderr.splitlines()[-1]
