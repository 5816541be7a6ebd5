"""The files for containers: read as Docker, Prefect's workers, its server and Kubernetes would read them."""

import json
import re
import shlex
import subprocess
import sys
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
from nanodlm.errors import SECRETS
from tests.support.commands import environment

ROOT = Path(nanodlm.__file__).parents[1]
DEPLOY = ROOT / "deploy"
POOLS = ("docker", "kubernetes")


def template(pool: str) -> dict[str, Any]:
    return json.loads((DEPLOY / f"{pool}-pool.json").read_text())


def prefects_own(pool: str) -> dict[str, Any]:
    """The template that Prefect's server knows for a type of worker."""
    known = files("prefect.server.api.collections_data.views").joinpath("aggregate-worker-metadata.json").read_text()
    return json.loads(known)[f"prefect-{pool}"][pool]["default_base_job_configuration"]


def deployments(pool: str) -> list[dict[str, Any]]:
    return yaml.safe_load((DEPLOY / f"{pool}.yaml").read_text())["deployments"]


def filled(pool: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The job configuration as a worker gets it: by Prefect's own code, from defaults and a deployment's variables."""
    properties = template(pool)["variables"]["properties"]
    defaults = {name: prop["default"] for name, prop in properties.items() if "default" in prop}
    run = {"command": "prefect flow-run execute", "labels": {"prefect.io/flow-run-id": "1"}, "name": "run"}
    return apply_values(template(pool)["job_configuration"], {**run, **defaults, **variables})


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
        assert (found["work_pool_name"], found["parameters"]) == (pool, {"store": "/store"})
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
