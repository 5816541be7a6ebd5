"""Operating the pipeline: a real Prefect server, a real worker, deployments of this folder, real kills."""

import base64
import itertools
import json
import os
import re
import subprocess
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Suspended

from nanodlm.config import PRESETS
from nanodlm.stages.table import NAMES
from tests.operations.conftest import LONG, ROOT, SHORT, Site, config_of, wait_until
from tests.support import servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # whole servers and workers
OF_DEMO = {"deployments": {"name": {"any_": ["demo"]}}}  # the scheduler makes runs of others meanwhile
CACHED = dict.fromkeys(("download", "tokenizer", "split", "shard"), "Cached")


def gone(process: psutil.Process, seconds: float = 20) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


def test_prefect_deploys_everything_from_a_clone_without_a_remote(deployed: Site) -> None:
    flows_ = {flow["id"]: flow["name"] for flow in deployed.ask("/flows/filter", {})}
    found = {f"{flows_[d['flow_id']]}/{d['name']}": d for d in deployed.ask("/deployments/filter", {})}
    assert {name for name, d in found.items() if d["work_pool_name"] == "default"} == {
        "pipeline/demo",
        "pipeline/nightly",
        "prepare/data",
        "train/gpu",
        "evaluate/bound",
        "sample/texts",
        "gc/weekly",
    }
    assert {d["job_variables"]["env"]["NANODLM_FOLDER"] for d in found.values()} == {str(deployed.clone)}
    assert all("nanodlm" in deployment["tags"] for deployment in found.values())
    of_nightly = {"deployments": {"name": {"any_": ["nightly"]}}}
    wait_until(lambda: deployed.ask("/flow_runs/count", of_nightly) > 0)  # the server's scheduler is at work
    (nightly,) = found["pipeline/nightly"]["schedules"]
    assert (nightly["schedule"]["cron"], nightly["schedule"]["timezone"]) == ("0 2 * * *", "Europe/Berlin")


def test_the_form_of_a_run_shows_groups_descriptions_bounds_and_choices(deployed: Site) -> None:
    schema = deployed.ask("/deployments/name/train/gpu")["parameter_openapi_schema"]
    assert all(len(schema["properties"][name]["description"]) > 20 for name in schema["properties"])
    assert schema["properties"]["preset"]["enum"] == list(PRESETS)
    groups = schema["properties"]["config"]["properties"]
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
        ({"config": {"train.lr": -1}}, "train.lr"),
        ({"preset": "dmeo"}, "preset"),
        ({"store": "s3://key:secret@bucket/store"}, "store"),
    ],
)
def test_a_bad_parameter_is_refused_before_a_run_is_scheduled(
    deployed: Site, parameters: dict[str, Any], names: str
) -> None:
    before = deployed.ask("/flow_runs/count", OF_DEMO)
    with pytest.raises(PrefectHTTPStatusError) as refusal:
        deployed.start("pipeline/demo", **parameters)
    assert refusal.value.response.status_code == 409
    assert names in refusal.value.response.json()["detail"]
    assert deployed.ask("/flow_runs/count", OF_DEMO) == before


def test_a_run_on_a_server_without_limits_shows_a_report(site: Site) -> None:
    run = site.start("pipeline/demo", config=SHORT, gpu_limit="nobody-made-this")
    assert site.ends(run) == "Completed"
    assert site.tasks(run) == CACHED | dict.fromkeys(("train", "evaluate", "sample", "report"), "Completed")
    assert wait_until(lambda: site.lines(run, "Concurrency limits ['nobody-made-this'] do not exist"))
    tasks = site.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert {task["name"]: task["tags"] for task in tasks} == {name: [] for name in (*NAMES, "report")}

    artifacts = site.ask("/artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}})
    shown = {artifact["key"]: artifact for artifact in artifacts}
    assert set(shown) == {"report"}
    texts = next(site.store.glob("sample/*/attempts/*/samples.jsonl")).read_text().splitlines()
    words = max(json.loads(texts[0])["text"].split(), key=len)
    assert shown["report"]["task_run_id"] is None, "the one place to look is the run itself"
    (curve,) = re.findall(r"!\[loss curve\]\((data:image/svg[^)]*)\)", shown["report"]["data"])
    drawn = base64.b64decode(curve.partition(",")[2]).decode()
    for text in ("training", "validation", "unigram entropy"):
        assert f">{text}</text>" in drawn
    for text in (
        "validation bound",
        "bits per byte",
        "unigram entropy",
        words,
        "/report.html\n",
        f"Store: `{site.store}`",
    ):
        assert text in shown["report"]["data"]
    assert wait_until(lambda: site.lines(run, "± "), 20), "the bound is in the log"
    made = json.loads(next(site.store.glob("train/*/manifest.json")).read_text())
    assert made["flow_run"] == run

    again = site.start("pipeline/demo", config=SHORT)
    alone = site.start("sample/texts", config=SHORT, rebuild=True)
    missing = site.start("evaluate/bound", config=LONG)
    assert site.ends(again) == "Completed"
    assert set(site.tasks(again).values()) == {"Cached"}
    assert site.ends(alone) == "Completed"
    assert site.tasks(alone) == CACHED | {"train": "Cached", "sample": "Completed"}
    assert site.ends(missing) == "Failed"
    assert "train is not built" in site.state(missing, "message")
    wait_until(lambda: site.lines(missing, "train is not built"))
    assert not site.lines(missing, "Traceback")


def test_a_killed_trainer_fails_its_run_and_a_retry_goes_on(site: Site) -> None:
    run = site.start("train/gpu", config=LONG)
    site.trainer(least_step=40).kill()
    assert site.ends(run) == "Failed"
    assert site.state(run, "message").endswith("the train process ended with signal 9; run again to continue")
    assert site.tasks(run) == CACHED | {"train": "Failed"}
    saved = site.steps()
    site.succeeds("flow-run", "retry", run)
    trainer = site.trainer(least_step=saved + 20)
    wait_until(lambda: site.lines(run, "continuing after update"), otherwise=site.log)
    (line,) = site.lines(run, "continuing after update")
    assert int(line["message"].rpartition(" ")[2].replace(",", "")) >= saved
    site.cancel(run)
    assert gone(trainer)


def test_a_killed_flow_is_reported_as_crashed_and_its_trainer_saves_and_ends(site: Site) -> None:
    run = site.start("train/gpu", config=LONG)
    trainer = site.trainer(least_step=40)
    before, flow = site.steps(), trainer.parent()
    assert flow is not None
    flow.kill()
    assert gone(trainer)
    assert site.ends(run, 30) == "Crashed"
    assert site.steps() >= before


def test_runs_take_turns_at_a_limit_and_give_their_slot_back_when_they_are_stopped(site: Site) -> None:
    site.succeeds("gcl", "create", "gpu", "--limit", "1")
    holder = site.start("train/gpu", config=LONG)
    trainer = site.trainer(least_step=20)
    impatient, patient = (site.start("train/gpu", config=config) for config in (SHORT, LONG))
    for run in (impatient, patient):
        said = "waiting for a slot of the concurrency limit gpu"
        wait_until(lambda run=run, said=said: site.lines(run, said), otherwise=site.log)
    site.cancel(impatient)
    assert trainer.is_running()
    assert site.taken() == 1
    assert not site.lines(patient, "train: building")
    site.cancel(holder)
    assert gone(trainer)
    wait_until(lambda: site.lines(patient, "train: building"), otherwise=site.log)
    assert site.taken() == 1
    saved = site.steps()
    flow = site.trainer(least_step=saved + 20).parent()
    assert flow is not None
    flow.terminate()
    assert site.ends(patient) == "Crashed"
    wait_until(lambda: site.taken() == 0, 20)
    site.succeeds("gcl", "delete", "gpu")


def test_a_suspended_run_saves_ends_and_goes_on_when_it_is_resumed(site: Site) -> None:
    run = site.start("train/gpu", config=LONG)
    trainer = site.trainer(least_step=20)
    with site.client() as client:
        client.set_flow_run_state(run, Suspended(timeout_seconds=3600))  # type: ignore[arg-type]
    assert gone(trainer, 60)
    saved = site.steps()
    assert site.state(run) == "Suspended"
    site.ask(f"/flow_runs/{run}/resume", {})
    again = site.trainer(least_step=saved + 20)
    site.cancel(run)
    assert gone(again)


def test_a_retry_does_not_rebuild_what_its_run_has_rebuilt(site: Site) -> None:
    assert site.ends(site.start("train/gpu", config=SHORT)) == "Completed"
    run = site.start("train/gpu", config=SHORT, rebuild=True)
    assert site.ends(run) == "Completed"
    assert site.tasks(run)["train"] == "Completed"
    site.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "FAILED"}, "force": True})
    site.succeeds("flow-run", "retry", run)
    wait_until(lambda: site.ask(f"/flow_runs/{run}")["run_count"] == 2, otherwise=site.log)
    assert site.ends(run) == "Completed"
    wait_until(lambda: site.lines(run, "train: cached"))


def test_a_run_that_is_cancelled_after_an_outage_of_a_minute_saves_and_ends(prepared: Path, tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    store = tmp_path / "store"
    subprocess.run(["cp", "-al", str(prepared), str(store)], check=True)
    environ = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PYTHONPATH": str(ROOT)}
    environ["PREFECT_HOME"] = str(tmp_path / "client")
    with ExitStack() as stack, ExitStack() as server:
        server.enter_context(servers.prefect(tmp_path, port))
        site = Site(tmp_path, ROOT, environ, stack, store)
        site.deploy()
        run = site.start("train/gpu", config=LONG)
        trainer = site.trainer(least_step=20)
        server.close()
        time.sleep(60)  # Prefect's own listening ends after half of that
        assert trainer.is_running()
        server.enter_context(servers.prefect(tmp_path, port))
        before = site.steps()
        site.succeeds("flow-run", "cancel", run)
        assert site.ends(run, 60) == "Cancelled"
        assert gone(trainer)
        assert site.steps() >= before


def test_training_goes_on_while_the_server_is_away(prepared: Path, tmp_path: Path) -> None:
    away = float(os.environ.get("OUTAGE_SECONDS", "15"))
    (port,) = servers.free_ports(1)
    store = tmp_path / "store"
    subprocess.run(["cp", "-al", str(prepared), str(store)], check=True)
    config = config_of("--train.max_steps", str(int(200 * (away + 30))), "--exp.save_every", "500")
    environ = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PYTHONPATH": str(ROOT)}
    environ["PREFECT_HOME"] = str(tmp_path / "client")

    with ExitStack() as stack, ExitStack() as server:
        server.enter_context(servers.prefect(tmp_path, port))
        site = Site(tmp_path, ROOT, environ, stack, store)
        site.deploy()
        site.succeeds("gcl", "create", "gpu", "--limit", "1")
        run = site.start("train/gpu", config=config)
        trainer = site.trainer(least_step=500)
        server.close()
        before = site.steps()
        time.sleep(away)
        assert trainer.is_running()
        assert before < site.steps() < config["train"]["max_steps"]
        server.enter_context(servers.prefect(tmp_path, port))
        assert site.state(run) == "Running"
        assert site.taken() == 1  # so nobody else takes the device
        assert site.ends(run, 300) == "Completed"
        assert site.tasks(run) == CACHED | {"train": "Completed"}
        assert site.taken() == 0
        # The log has a line of progress every 30 s, and never more.
        lines = [datetime.fromisoformat(log["timestamp"]).timestamp() for log in site.lines(run, " bits per byte, ")]
        assert all(later - earlier >= 29 for earlier, later in itertools.pairwise(lines))
