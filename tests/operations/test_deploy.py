"""The files of `prefect.yaml` and deploy/: read as Docker, Prefect, systemd and Kubernetes do, and tried."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from docker.types import HostConfig
from prefect.client.orchestration import SyncPrefectClient
from prefect.utilities.templating import apply_values, find_placeholders

import nanodlm
from nanodlm.config import PRESETS, changed
from nanodlm.errors import SECRETS
from nanodlm.stages.process import GRACE_SECONDS
from tests.operations.conftest import LONG, Site, below, wait_until
from tests.support.commands import environment

ROOT = Path(nanodlm.__file__).parents[1]
DEPLOY = ROOT / "deploy"
POOLS = ("docker", "kubernetes")
UNITS = ("server", "worker")
PAGE = (ROOT / "docs" / "operations.md").read_text()
WALK_THROUGH = PAGE.split("```bash\n")[1].split("```")[0]


def template(pool: str) -> dict[str, Any]:
    return json.loads((DEPLOY / f"{pool}-pool.json").read_text())


def prefects_own(pool: str) -> dict[str, Any]:
    """The template that Prefect's server knows for a type of worker."""
    known = files("prefect.server.api.collections_data.views").joinpath("aggregate-worker-metadata.json").read_text()
    return json.loads(known)[f"prefect-{pool}"][pool]["default_base_job_configuration"]


def deployments(pool: str = "") -> list[dict[str, Any]]:
    """The deployments of a pool's file, or those of `prefect.yaml`."""
    return yaml.safe_load((DEPLOY / f"{pool}.yaml" if pool else ROOT / "prefect.yaml").read_text())["deployments"]


def nightly(pool: str = "") -> dict[str, Any]:
    (found,) = (deployment for deployment in deployments(pool) if deployment["name"].startswith("nightly"))
    return found


def filled(pool: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The job configuration as a worker gets it: by Prefect's own code, from defaults and a deployment's variables."""
    properties = template(pool)["variables"]["properties"]
    defaults = {name: prop["default"] for name, prop in properties.items() if "default" in prop}
    run = {"command": "prefect flow-run execute", "labels": {"prefect.io/flow-run-id": "1"}, "name": "run"}
    return apply_values(template(pool)["job_configuration"], {**run, **defaults, **variables})


# Deployments


def test_deployments_are_called_by_what_they_do() -> None:
    called = [f"{d['entrypoint'].split('.')[-1]}/{d['name']}" for d in deployments()]
    names = "pipeline/demo pipeline/nightly prepare/data train/gpu evaluate/bound sample/texts gc/weekly"
    assert called == names.split()
    assert [name for name in called if f"`{name}`" not in PAGE] == []


def test_the_nightly_deployment_has_settings_of_its_own_that_the_demo_takes() -> None:
    config = changed("demo", nightly()["parameters"]["config"])
    assert config.exp.run_name == "nightly"
    assert config.train.max_steps > PRESETS["demo"].train.max_steps


@pytest.mark.parametrize("pool", POOLS)
def test_deployments_for_containers_promise_what_those_of_a_worker_do(pool: str) -> None:
    ours = nightly()
    promised = {k: v for k, v in ours["work_pool"]["job_variables"]["env"].items() if k != "NANODLM_FOLDER"}
    for deployment in deployments(pool):
        assert deployment["work_pool"]["job_variables"]["env"] == promised
        assert "nanodlm" in deployment["tags"]  # by which automations find runs
        assert deployment["parameters"]["gpu_limit"] == "gpu"
    assert nightly(pool)["parameters"] == {"store": "/store", **ours["parameters"]}


def test_the_version_of_prefect_is_said_in_one_place() -> None:
    files = [ROOT / "prefect.yaml", *DEPLOY.glob("*.yaml")]
    assert [file for file in files if "prefect-version" in file.read_text()] == []


# Stopping a worker


def stand_in(folder: Path, program: str) -> dict[str, str]:
    """An environment in which `prefect` is a program of the test's."""
    path = folder / "bin" / "prefect"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    return environment(PATH=f"{path.parent}:/usr/bin:/bin", PREFECT_HOME=str(folder))


def command_of_runs() -> list[str]:
    (command,) = {deployment["work_pool"]["job_variables"]["command"] for deployment in deployments()}
    return shlex.split(command)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_worker_that_a_script_starts_as_the_page_says_hears_the_first_sigterm(shell: str, tmp_path: Path) -> None:
    (line,) = (line for line in WALK_THROUGH.splitlines() if "worker start" in line)
    (tmp_path / "script").write_text(f"{line}\nwait\n")  # a worker turns SIGTERM to SIGINT
    told = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    subprocess.run([shell, "script"], cwd=tmp_path, env=stand_in(tmp_path, told), timeout=30, check=True)
    assert (tmp_path / "worker.log").read_text() == "True\n"


def test_a_run_is_told_by_sigterm_that_its_worker_has_stopped_and_not_before(tmp_path: Path) -> None:
    run = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("told").touch() or exit())
pathlib.Path("started").touch()
time.sleep(60)
"""
    with subprocess.Popen(command_of_runs(), cwd=tmp_path, env=stand_in(tmp_path, run)) as shell:
        wait_until((tmp_path / "started").exists, 20)
        started = below(shell.pid)
        for process in started:
            process.send_signal(signal.SIGINT)  # systemd sends it to all
        time.sleep(1.5)
        assert not (tmp_path / "told").exists()
        shell.kill()  # so a worker ends what it has started
    wait_until((tmp_path / "told").exists, 20)
    wait_until(lambda: not [process for process in started if process.is_running()], 20)


def test_a_worker_learns_how_a_run_has_ended_and_a_file_has_what_it_said(tmp_path: Path) -> None:
    env = stand_in(tmp_path, "raise SystemExit('no server')")
    assert subprocess.run(command_of_runs(), env=env, timeout=30, check=False).returncode == 1
    assert (tmp_path / "runs.log").read_text() == "no server\n"


def test_a_run_that_was_put_off_is_not_taken_for_a_lost_one() -> None:
    (lost,) = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    assert "prefect.flow-run.AwaitingRetry" in lost["trigger"]["expect"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_stopped_puts_its_run_off_and_frees_the_device_and_the_next_one_goes_on(site: Site) -> None:
    def taken() -> int:
        return site.ask("/v2/concurrency_limits/planned-stop")["active_slots"]

    site.succeeds("gcl", "create", "planned-stop", "--limit", "1")
    run = site.start("train/gpu", config=LONG, gpu_limit="planned-stop")
    site.trainer(least_step=40)
    worker = site.work()
    assert taken() == 1
    started = below(worker.pid)
    worker.terminate()
    wait_until(lambda: site.state(run) == "AwaitingRetry", 30, lambda: site.state(run))
    assert worker.wait(60) == 0
    wait_until(lambda: taken() == 0 and not [process for process in started if process.is_running()], 60)
    saved = site.steps()

    site.work()
    wait_until(lambda: site.steps() > saved, 120, site.log)
    wait_until(lambda: site.lines(run, f"continuing after update {saved}"), 60, site.log)  # a little later
    site.cancel(run)


# Services


def unit(name: str) -> list[tuple[str, str]]:
    """The settings of a unit of systemd, in order."""
    lines = (DEPLOY / f"nanodlm-{name}.service").read_text().splitlines()
    return [tuple(line.split("=", 1)) for line in lines if "=" in line and line[0] != "#"]  # type: ignore[misc]


@pytest.mark.parametrize("name", UNITS)
def test_a_service_sends_no_telemetry_and_stays_on_this_machine(name: str) -> None:
    settings = unit(name)
    environ = dict(word.split("=", 1) for key, text in settings if key == "Environment" for word in text.split())
    assert environ["DO_NOT_TRACK"] == "1"
    assert not [variable for variable in environ if SECRETS.search(variable)]
    start = dict(settings)["ExecStart"]
    if name == "server":
        assert environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
        assert start.endswith(" --host 127.0.0.1")
    else:
        assert environ["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
        assert environ["PATH"].split(":")[0] == str(Path(start.split()[0]).parent)  # where its runs find `prefect`
    assert (dict(settings)["Restart"], dict(settings)["EnvironmentFile"][:1]) == ("on-failure", "-")


def test_a_service_that_is_stopped_lets_a_training_save() -> None:
    settings = dict(unit("worker"))
    assert (settings["KillMode"], settings["KillSignal"]) == ("control-group", "SIGINT")
    assert float(settings["TimeoutStopSec"]) > GRACE_SECONDS + 30  # before it, Prefect waits for a flow


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_services(tmp_path: Path) -> None:
    for name in UNITS:
        text = (DEPLOY / f"nanodlm-{name}.service").read_text().replace("/home/nanodlm/nanodlm/.venv/bin", "/bin")
        text = text.replace("/bin/prefect", "/bin/true").replace("User=nanodlm", "User=root")
        (tmp_path / f"nanodlm-{name}.service").write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_walk_through_sends_no_telemetry() -> None:
    before, _ = WALK_THROUGH.split("prefect server start")
    assert "\nexport DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false " in before


# Work pools


@pytest.mark.parametrize("pool", POOLS)
def test_the_variables_of_a_pool_are_a_schema_and_every_placeholder_is_one_of_them(pool: str) -> None:
    variables = template(pool)["variables"]
    jsonschema.Draft7Validator.check_schema(variables)
    used = {placeholder.name for placeholder in find_placeholders(template(pool)["job_configuration"])}
    assert used == set(variables["properties"])
    defaults = {name: prop["default"] for name, prop in variables["properties"].items() if "default" in prop}
    jsonschema.validate(defaults, variables)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_offers_what_its_worker_knows_but_no_privileges_and_deployments_set_nothing_else(pool: str) -> None:
    known, ours = prefects_own(pool), template(pool)
    assert set(known["job_configuration"]) - set(ours["job_configuration"]) <= {"privileged"}
    assert set(known["variables"]["properties"]) - set(ours["variables"]["properties"]) <= {"privileged"}
    schema = {**ours["variables"], "additionalProperties": False}
    for deployment in deployments(pool):
        assert deployment["work_pool"]["name"] == pool
        jsonschema.validate(deployment["work_pool"].get("job_variables", {}), schema)


@pytest.mark.parametrize("name", ["nightly-kubernetes", "gpu-kubernetes"])
def test_the_job_of_a_kubernetes_deployment_is_as_kubernetes_defines_it(name: str) -> None:
    (deployment,) = (d for d in deployments("kubernetes") if d["name"] == name)
    job = filled("kubernetes", deployment["work_pool"].get("job_variables", {}))["job_manifest"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    gpus = {"nvidia.com/gpu": "1"} if name == "gpu-kubernetes" else {}
    assert container["resources"]["limits"] == gpus
    # Prefect's worker makes these two from a dict and a text, and cannot do without the two in the wrong place.
    assert container["args"] == "prefect flow-run execute"
    container["args"] = shlex.split(container["args"])
    container["env"] = [{"name": n, "value": v} for n, v in container["env"].items()]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    kubernetes_validate.validate(job, "1.30", strict=True)
    assert pod["securityContext"]["runAsNonRoot"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    pod["volumes"][0]["persistentVolume"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.30", strict=True)


def test_a_docker_deployment_for_gpus_asks_docker_for_all_of_them() -> None:
    (deployment,) = (d for d in deployments("docker") if d["name"] == "gpu-docker")
    more = filled("docker", deployment["work_pool"]["job_variables"])["container_create_kwargs"]
    (request,) = HostConfig(version="1.43", **more)["DeviceRequests"]
    assert (request["Driver"], request["Count"], request["Capabilities"]) == ("nvidia", -1, [["gpu"]])


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_a_server_takes_the_pool_and_its_deployments(prefect_server: dict[str, str], pool: str) -> None:
    create = ["work-pool", "create", pool, "--type", pool, "--base-job-template", f"deploy/{pool}-pool.json"]
    for command in (create, ["--no-prompt", "deploy", "--all", "--prefect-file", f"deploy/{pool}.yaml"]):
        prefect = [sys.executable, "-m", "prefect", *command]
        env = environment(**prefect_server)
        done = subprocess.run(prefect, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr

    def asked(path: str) -> dict[str, Any]:
        with SyncPrefectClient(prefect_server["PREFECT_API_URL"]) as client:
            return client.request("GET", path).json()  # type: ignore[arg-type]

    for name in (f"pipeline/nightly-{pool}", f"train/gpu-{pool}"):
        found = asked(f"/deployments/name/{name}")
        assert (found["work_pool_name"], found["parameters"]["store"]) == (pool, "/store")
        assert found["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]["directory"] == "/app"
        assert [s["schedule"]["cron"] for s in found["schedules"]] == ["0 3 * * *"] * name.startswith("pipeline")
    made = asked(f"/work_pools/{pool}")
    assert (made["type"], made["base_job_template"]) == (pool, template(pool))


# The image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: name and the rest, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def copied() -> set[str]:
    """What the image is made from."""
    return {source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]}


def test_the_image_copies_what_is_there_and_what_its_ignore_file_lets_through() -> None:
    assert all((ROOT / source).exists() for source in copied())
    ignored = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert {*packages, project["project"]["readme"]} <= copied()
    assert set(project["project"]["license-files"]) <= copied()


def test_the_image_installs_pinned_versions_and_is_not_run_by_root() -> None:
    found = instructions()
    names = [name for name, _ in found]
    assert set(names) <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "CMD"}
    assert found[0] == ("FROM", "python:3.11-slim")
    assert ("WORKDIR", "/app") in found
    (install,) = (rest for name, rest in found if name == "RUN" and "pip install" in rest)
    assert "-c constraints.txt" in install
    wanted = re.search(r"\.\[([^\]]*)\]", install)
    assert wanted
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(wanted[1].replace("${EXTRA}", ",cuda").split(",")) == {"s3", "gcs", "cuda"} <= set(extras)
    assert ("USER", "1000:1000") in found[names.index("RUN") :]
    assert found[names.index("USER") :] == [("USER", "1000:1000"), *found[names.index("USER") + 1 :]]
    assert "RUN" not in names[names.index("USER") :]
    for name, rest in found:
        if name == "RUN":
            assert subprocess.run(["sh", "-n"], input=rest, text=True, check=False).returncode == 0


def test_no_file_for_containers_holds_or_takes_a_secret() -> None:
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            assert not [word for word in re.findall(r"(\w+)=", rest) if SECRETS.search(word)]
    for pool in POOLS:
        env = template(pool)["variables"]["properties"]["env"]["default"]
        assert not [name for name in env if SECRETS.search(name)]
