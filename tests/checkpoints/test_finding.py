from pathlib import Path

import pytest

from nanodlm.checkpoints.finding import find_model
from nanodlm.errors import NanodlmError
from nanodlm.store import Artifact, Store, new_attempt, sealed
from tests.support.helpers import identity


def trained(store: Store, fingerprint: str, created: str, run_name: str) -> Artifact:
    with new_attempt(store, "train", fingerprint) as attempt:
        artifact = attempt.commit(identity=identity("train"), metrics={}, config={"exp": {"run_name": run_name}})
    store.write_json(
        store.path("train", fingerprint, "manifest.json"), sealed({**artifact.manifest, "created": created})
    )
    return artifact


def test_a_model_is_named_by_its_run_or_address_or_the_beginning_of_one_or_is_the_newest(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(NanodlmError, match="holds no trained model: `nanodlm run` trains one, or name a run"):
        find_model("", store)
    old = trained(store, "aaaa1" * 12, "2026-01-01T00:00:00Z", "first")
    new = trained(store, "bbbb2" * 12, "2026-02-01T00:00:00Z", "second")
    again = trained(store, "cccc3" * 12, "2026-01-02T00:00:00Z", "first")
    assert find_model("", store) == find_model("second", store) == find_model("bbbb2", store) == new.uri
    assert find_model("first", store) == find_model("train/cccc3", store) == again.uri
    for address in (old.uri, f"{old.uri}/step_100", "runs/mine/checkpoints/step_100"):
        assert find_model(address, store) == address
    slashed = trained(store, "dddd4" * 12, "2025-01-01T00:00:00Z", "mine/abcd")
    assert find_model("mine/abcd", store) == slashed.uri, "a name may hold a slash"
    with pytest.raises(NanodlmError, match="no model 'third'"):
        find_model("third", store)
