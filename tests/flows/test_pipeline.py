"""The pipeline as a person runs it: real processes, a real Prefect server, killed for real."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

from nanodlm.cli.arguments import parse
from nanodlm.cli.console import Console
from nanodlm.cli.run import plan
from nanodlm.flows import pipeline
from nanodlm.stages.table import NAMES, until
from nanodlm.store import Store
from tests.support.commands import nanodlm, result_of, started, statuses, tiny_flags
from tests.support.helpers import prose

ALL_CACHED = dict.fromkeys(NAMES, "cached")


@pytest.fixture(scope="module")
def server(prefect_server: dict[str, str]) -> dict[str, str]:
    return prefect_server


@pytest.fixture(scope="module")
def undisturbed(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A store filled by one uninterrupted run, and what the run printed."""
    store = tmp_path_factory.mktemp("store")
    return store, result_of(nanodlm("run", "--store", str(store), "--json", *tiny_flags(), **server))


def _tokens(result: dict) -> bytes:
    uri = next(s["uri"] for s in result["stages"] if s["stage"] == "sample")
    return next(Path(uri).glob("attempts/*/tokens.npy")).read_bytes()


def test_a_run_builds_every_stage_and_reports_its_metrics(undisturbed: tuple[Path, dict]) -> None:
    _, result = undisturbed
    assert statuses(result) == dict.fromkeys(NAMES, "built")
    metrics = result["metrics"]
    for name in ("val_bits_per_byte", "val_bits_per_byte_stderr", "val_unigram_bits_per_byte", "val_nats_per_token"):
        assert 0 < metrics[name] < 10
    assert metrics["train_tokens_per_second"] > 0
    assert len(metrics["parameters_sha256"]) == 64
    assert (next(Path(result["report"]).glob("attempts/*/report.html"))).read_text().startswith("<!doctype html>")


def test_a_second_run_is_cached_and_starts_no_orchestrator(undisturbed: tuple[Path, dict]) -> None:
    store, first = undisturbed
    # Any attempt to reach a server at this address would fail the run.
    again = result_of(
        nanodlm("run", "--store", str(store), "--json", *tiny_flags(), PREFECT_API_URL="http://127.0.0.1:9/api")
    )
    assert statuses(again) == ALL_CACHED
    assert again["metrics"] == first["metrics"]


def test_a_run_goes_on_when_the_source_is_gone_after_its_download(server: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(prose(300)))
    words = ("--data.source", "corpus.txt", "--data.sample_by", "line", "--data.tokenizer", "bytes")
    words += ("--data.val_tokens", "1000", "--store", "store", "--json", "--until")
    first = result_of(nanodlm("run", *words, "download", cwd=tmp_path, **server))
    (tmp_path / "corpus.txt").unlink()
    done = nanodlm("run", *words, "shard", cwd=tmp_path, **server)
    assert statuses(result_of(done)) == {"download": "cached", "tokenizer": "built", "split": "built", "shard": "built"}
    assert result_of(done)["stages"][0]["uri"] == first["stages"][0]["uri"]
    assert done.stderr.count("the files of corpus.txt are gone: download/") == 1


def test_prefect_shows_hits_as_cached_and_a_new_learning_rate_rebuilds_only_what_depends_on_it(
    undisturbed: tuple[Path, dict], server: dict[str, str]
) -> None:
    store, _ = undisturbed
    result = result_of(nanodlm("run", "--store", str(store), "--json", *tiny_flags(), "--train.lr", "0.002", **server))
    assert statuses(result) == ALL_CACHED | dict.fromkeys(("train", "evaluate", "sample"), "built")
    with SyncPrefectClient(server["PREFECT_API_URL"]) as client:
        body = {"sort": "EXPECTED_START_TIME_DESC", "limit": len(until("sample"))}
        runs = client.request("POST", "/task_runs/filter", json=body).json()
    built = ("train", "evaluate", "sample", "report")
    states = {run["name"]: run["state_name"] for run in runs}
    assert states == {name: "Completed" if name in built else "Cached" for name in until("sample")}


def test_rebuilding_a_stage_with_the_same_bytes_leaves_what_follows_cached(
    undisturbed: tuple[Path, dict], server: dict[str, str]
) -> None:
    store, _ = undisturbed
    result = result_of(nanodlm("run", "--store", str(store), "--json", "--rebuild", "shard", *tiny_flags(), **server))
    assert statuses(result) == ALL_CACHED | {"shard": "built"}


@pytest.mark.slow
def test_a_run_that_is_killed_four_times_ends_with_the_same_bits_as_an_undisturbed_one(
    undisturbed: tuple[Path, dict], server: dict[str, str], tmp_path: Path
) -> None:
    store, reached = tmp_path / "store", []
    arguments = ("run", "--store", str(store), "--json", *tiny_flags())
    for stage in ("tokenizer", "shard", "train", "evaluate"):
        # In training, kill after the first checkpoint; elsewhere as soon as there is an attempt.
        sign = "attempts/*/parts/checkpoints/*.json" if stage == "train" else "attempts/*"
        with started(*arguments, **server) as process:
            while not list(store.glob(f"{stage}/*/{sign}")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.002)
            reached.append((stage, list(store.glob(f"{stage}/*/manifest.json"))))
            holders = [json.loads(p.read_text())["pid"] for p in store.glob(f"{stage}/*/lease.json")]
            process.send_signal(signal.SIGKILL)
            for pid in holders:
                if pid != process.pid:
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    assert sum(not manifests for _, manifests in reached) >= 2, f"killed before the commit: {reached}"
    result = result_of(nanodlm(*arguments, **server))
    assert statuses(result)["train"] == "cached"
    _, expected = undisturbed
    assert result["metrics"]["parameters_sha256"] == expected["metrics"]["parameters_sha256"]
    assert result["metrics"]["val_nats_per_token"] == expected["metrics"]["val_nats_per_token"]
    assert result["metrics"]["resumed_from_update"] > 0
    assert _tokens(result) == _tokens(expected)


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_exits_with_75_and_leaves_no_process(
    undisturbed: tuple[Path, dict], server: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("run", "--store", str(tmp_path), "--json", *tiny_flags())
    with started(*arguments, **server) as process:
        while not list(tmp_path.glob("train/*/attempts/*/parts/checkpoints/*.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        trainer = json.loads(next(tmp_path.glob("train/*/lease.json")).read_text())["pid"]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "run again to continue" in said
    assert not psutil.pid_exists(trainer)
    result = result_of(nanodlm(*arguments, **server))
    assert result["metrics"]["parameters_sha256"] == undisturbed[1]["metrics"]["parameters_sha256"]


def test_the_server_of_a_killed_run_ends_by_itself(tmp_path: Path) -> None:
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": ""}
    with started("run", "--store", str(tmp_path / "store"), *tiny_flags(), **home) as process:
        while not (servers := psutil.Process(process.pid).children()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert psutil.wait_procs(servers, 30)[1] == [], "the Prefect server outlived its run"


@pytest.mark.slow
def test_a_run_whose_server_is_killed_keeps_what_it_trains_and_says_so_at_once(tmp_path: Path) -> None:
    store, home = tmp_path / "store", {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": ""}
    arguments = ("run", "--store", str(store), "--until", "train", *tiny_flags())
    with started(*arguments, **home, PREFECT_CLIENT_MAX_RETRIES="0") as process:
        while not list(store.glob("train/*/attempts/*/parts/checkpoints/*.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        (server,) = [p for p in psutil.Process(process.pid).children() if "nanodlm.flows.server" in p.cmdline()]
        server.kill()
        _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "nanodlm: the local Prefect server has failed" in said
    assert "what is finished is kept: run again" in said
    assert list(store.glob("train/*/manifest.json"))


@pytest.mark.slow
def test_the_seconds_of_a_stage_leave_out_what_it_has_waited_for_a_device(
    undisturbed: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def waits(limit: str | None, _: Any) -> Iterator[None]:
        assert limit == "gpu"
        time.sleep(5)
        yield

    monkeypatch.setattr(pipeline, "hold_device", waits)
    told = pipeline.WATCHER.set(Console(sys.stderr))
    try:
        store = Store(str(undisturbed[0]))
        inputs = {artifact.stage: artifact for artifact in map(store.open, (f"{s}/{f}" for s, f in store))}
        call: Any = parse("plan", plan, tiny_flags())
        options: Any = {"build": True, "rebuild": "sample", "gpu_limit": "gpu"}
        began = time.monotonic()
        given = {name: inputs[name] for name in ("shard", "train")}
        _, made = pipeline.stage_task.fn("sample", call.keywords["config"], store.uri(), given, **options)
    finally:
        pipeline.WATCHER.reset(told)
    assert made["status"] == "built"
    assert made["seconds"] < time.monotonic() - began - 5


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_s3(server: dict[str, str], s3_environment: None, tmp_path: Path) -> None:
    fsspec.filesystem("s3").mkdir("pipeline")
    arguments = ("run", "--store", "s3://pipeline/runs", "--json", *tiny_flags(), "--train.max_steps", "40")
    result = result_of(nanodlm(*arguments, **server))
    assert statuses(result) == dict.fromkeys(NAMES, "built")
    assert statuses(result_of(nanodlm(*arguments))) == ALL_CACHED
    found = result_of(nanodlm("verify", "--store", "s3://pipeline/runs", "--deep", "--json"))
    assert (len(found["artifacts"]), found["damaged"]) == (len(until("sample")), 0)
    assert not (tmp_path / "s3:").exists()


def test_a_flow_of_a_bad_configuration_is_refused_in_one_line(server: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    done = nanodlm("run", "--store", str(tmp_path / "s"), "--data.source", str(text), **server)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "no training row" in done.stderr


def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    named = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path)}
    done = nanodlm("run", "--store", str(tmp_path / "s"), *tiny_flags(), **named)
    assert done.returncode == 1
    assert done.stderr.startswith("nanodlm: no Prefect server answers at http://127.0.0.1:9/api: start it")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
