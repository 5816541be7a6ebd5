"""The gc flow on a real server: what it removes, what it records, what it refuses."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from nanodlm.errors import UsageError
from nanodlm.flows.upkeep import gc
from nanodlm.store import Store, new_attempt
from tests.operations.conftest import wait_until
from tests.support.helpers import committed, fill

OLD = 7200.0  # seconds


@pytest.fixture
def client(prefect_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = prefect_server["PREFECT_API_URL"]
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


def attempts(store: Store) -> set[str]:
    return {path.parts[-3] for path in Path(store.root).glob("train/*/attempts/*")}


@pytest.mark.slow
@pytest.mark.usefixtures("client")
def test_an_abandoned_attempt_goes_then_an_old_result(store: Store) -> None:
    (row,) = gc(store.uri(), dry_run=True)
    assert (row["kind"], row["bytes"]) == ("attempt", 500)
    assert attempts(store) == {"old", "new", "killed"}
    assert gc(store.uri()) == [row]
    assert attempts(store) == {"old", "new"}
    assert gc(store.uri()) == []
    removed = gc(store.uri(), keep_last=1, older_than="0s", grace="0s")
    assert [(row["kind"], row["bytes"]) for row in removed] == [("artifact", 1000)]
    assert len(list(store)) == 1


@pytest.mark.slow
def test_the_run_is_logged_and_stops_at_what_it_cannot_read(client: SyncPrefectClient, store: Store) -> None:
    with tags("gc-test"):
        gc(store.uri(), dry_run=True)
        with pytest.raises(UsageError, match=r"the address s3://\.\.\. holds a user name or password") as refusal:
            gc("s3://key:planted@bucket/x")
    assert "planted" not in str(refusal.value)
    runs = {run.state_name: run for run in client.read_flow_runs() if run.tags == ["gc-test"]}
    assert set(runs) == {"Completed", "Failed"}
    assert "planted" not in str(runs["Failed"].state)
    assert "planted" in str(runs["Failed"].parameters)  # which the server had by then, as docs/operations.md warns
    criteria = {"logs": {"flow_run_id": {"any_": [str(runs["Completed"].id)]}}}

    def logged() -> list[str]:
        return [row["message"] for row in client.request("POST", "/logs/filter", json=criteria).json()]

    wait_until(lambda: any(line.startswith("would remove attempt ") and line.endswith(", 500 B") for line in logged()))
    wait_until(lambda: f"would remove 1 of {store.uri()}, 500 B" in logged())


@pytest.mark.parametrize("bad", [{"keep_last": -1}, {"older_than": "soon"}, {"grace": "1 week"}, {"store": ""}])
def test_bad_parameters_are_refused_before_the_flow_runs(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterTypeError, match=next(iter(bad))):
        gc.validate_parameters(bad)


def test_the_form_of_a_deployment_shows_a_description_and_bounds_for_every_parameter() -> None:
    schema = parameter_schema(gc.fn).model_dump()["properties"]
    assert all(field["description"] for field in schema.values())
    assert schema["keep_last"]["anyOf"][0]["minimum"] == 0
    assert schema["grace"]["pattern"] == schema["older_than"]["anyOf"][0]["pattern"]
