"""The gc flow on a real server: what it removes, what it records, what it refuses."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows.server import ephemeral_server
from flows.upkeep import gc
from nanodlm.store import Store, new_attempt
from tests.support.commands import environment
from tests.support.helpers import committed, fill

OLD = 7200.0  # seconds


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    before = dict(os.environ)
    home = str(tmp_path_factory.mktemp("prefect"))
    os.environ.update(PREFECT_HOME=home, PREFECT_SERVER_ANALYTICS_ENABLED="false")
    try:
        with ephemeral_server() as url:
            yield url
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def client(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with an old result, a newer one, and what a run that was killed long ago has left."""
    store = Store(str(tmp_path / "store"))
    for name in ("old", "new"):
        committed(store, {"a.bin": b"a" * 1000}, "train", name)
    with new_attempt(store, "train", "killed") as attempt:
        fill(attempt, {"b.bin": b"b" * 500})
    for path in Path(store.root).rglob("*"):
        os.utime(path, (time.time() - OLD,) * 2)
    return store


def told(client: SyncPrefectClient) -> str:
    """The newest artifact that the flow has left."""
    found = client.request(
        "POST",
        "/artifacts/filter",
        json={
            "artifacts": ArtifactFilter(key=ArtifactFilterKey(any_=["gc"])).model_dump(mode="json"),
            "sort": "CREATED_DESC",
        },
    ).json()
    return found[0]["data"]


def attempts(store: Store) -> set[str]:
    return {path.parts[-3] for path in Path(store.root).glob("train/*/attempts/*")}


@pytest.mark.slow
def test_an_abandoned_attempt_goes_and_the_artifact_says_how_many_bytes(
    client: SyncPrefectClient, store: Store
) -> None:
    (row,) = gc(store.uri(), dry_run=True)
    assert told(client).startswith(f"would remove 1 of {store.uri()}, 500 B\n")
    assert attempts(store) == {"old", "new", "killed"}
    assert gc(store.uri()) == [row]
    assert told(client).splitlines() == [
        f"removed 1 of {store.uri()}, 500 B",
        "",
        "| kind | bytes | address |",
        "|---|---:|---|",
        f"| attempt | 500 | {row['uri']} |",
    ]
    assert attempts(store) == {"old", "new"}
    assert gc(store.uri()) == []
    assert told(client) == f"removed 0 of {store.uri()}, 0 B\n"


@pytest.mark.slow
def test_an_old_result_is_given_up_and_a_newer_one_kept(client: SyncPrefectClient, store: Store) -> None:
    removed = gc(store.uri(), keep_last=1, older_than="0s", grace="0s")
    assert [row["kind"] for row in removed if "killed" not in row["uri"]] == ["artifact"]
    assert len(list(store)) == 1
    assert "| artifact | 1,000 | " in told(client)


@pytest.mark.slow
def test_the_run_is_named_logged_and_stops_at_what_it_cannot_read(client: SyncPrefectClient, store: Store) -> None:
    with tags("nanodlm"):
        gc(store.uri(), dry_run=True)
        with pytest.raises(ParameterTypeError, match="store: String should match pattern") as refusal:
            gc("s3://key:planted@bucket/x")
    assert "planted" not in str(refusal.value)
    runs = {run.state_name: run for run in client.read_flow_runs() if run.tags == ["nanodlm"]}
    assert set(runs) == {"Completed", "Failed"}
    assert runs["Completed"].name == "gc-dry-run"
    assert "planted" not in str(runs["Failed"].state)
    assert "planted" in str(runs["Failed"].parameters)  # which the server had by then, as docs/operations.md warns
    deadline = time.monotonic() + 30
    while len(logs := _logged(client, runs["Completed"].id)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert any(line.startswith("would remove attempt ") and line.endswith(", 500 B") for line in logs)


def _logged(client: SyncPrefectClient, run: Any) -> list[str]:
    criteria = {"logs": {"flow_run_id": {"any_": [str(run)]}}}
    return [row["message"] for row in client.request("POST", "/logs/filter", json=criteria).json()]


@pytest.mark.parametrize("bad", [{"keep_last": -1}, {"older_than": "soon"}, {"grace": "1 week"}, {"store": ""}])
def test_bad_parameters_are_refused_before_the_flow_runs(bad: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ParameterTypeError, match=next(iter(bad))):
        gc.validate_parameters(bad)


def test_the_form_of_a_deployment_shows_a_description_and_bounds_for_every_parameter() -> None:
    schema = parameter_schema(gc.fn).model_dump()["properties"]
    assert all(field["description"] for field in schema.values())
    assert schema["keep_last"]["anyOf"][0]["minimum"] == 0
    assert schema["grace"]["pattern"] == schema["older_than"]["anyOf"][0]["pattern"]


@pytest.mark.slow
def test_the_flow_runs_by_itself_on_the_server_that_the_environment_names(url: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    env = environment(PREFECT_API_URL=url, PYTHONPATH=str(root), NO_PROXY="127.0.0.1")
    done = subprocess.run(
        [sys.executable, "-m", "flows.upkeep"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "removed 0 of " in done.stderr
