"""What a bucket costs: requests are counted on real servers, transfers measured beside plain ones."""

from pathlib import Path

import pytest

from benchmarks import bucket as costs
from nanodlm.errors import UsageError
from nanodlm.stages import lookup as stages_lookup
from nanodlm.stages import run, table
from nanodlm.store import Store
from tests.support import servers
from tests.support.helpers import prose, tiny_config


@pytest.fixture(params=["moto", "gcs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    server: servers.Server = request.getfixturevalue(f"{request.param}_server")
    server.enter(monkeypatch)
    return f"{server.store}/costs"


def test_a_cached_lookup_makes_at_most_three_requests_a_stage(bucket: str, tmp_path: Path) -> None:
    for i, text in enumerate(prose(40)):
        (tmp_path / f"{i}.txt").write_text(text)
    config, store = tiny_config(tmp_path / "*.txt"), Store(bucket)
    names = table.until("shard")
    for name in names:
        run.run_stage(name, config, store)
    with costs.counted(store) as requests:
        lookups = list(stages_lookup.look_up(config, store, names[-1]))
    assert all(lookup.artifact for lookup in lookups)
    assert len(lookups) == len(names)
    assert 0 < sum(requests.values()) <= 3 * len(names), requests


def test_a_publication_sends_each_file_once_and_the_manifest(bucket: str) -> None:
    found = costs.bucket(bucket, files=3, megabytes=0.1, repeats=1)
    assert sum(found["requests_publish"].values()) == 3 + 1
    assert sum(found["requests_hit"].values()) <= 3
    assert sum(found["requests_miss"].values()) <= 3
    assert min(found["publish_ratio"], found["stage_ratio"]) > 0
    assert not any("bench-" in path for path in Store(bucket).sizes(Store(bucket).root))


def test_a_store_on_this_disk_costs_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="used in place"):
        costs.bucket(str(tmp_path))
