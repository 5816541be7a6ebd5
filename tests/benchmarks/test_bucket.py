"""What a bucket costs: requests are counted on real servers, transfers measured beside plain ones."""

import pytest

from benchmarks.bucket import bucket
from nanodlm.store import Store
from tests.support import servers


@pytest.mark.parametrize("kind", ["moto", "gcs"])
def test_a_lookup_takes_three_requests_and_a_publication_one_for_each_file_and_the_manifest(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: servers.Server = request.getfixturevalue(f"{kind}_server")
    server.enter(monkeypatch)
    found = bucket(f"{server.store}/costs", files=3, megabytes=0.1, repeats=1)
    assert sum(found["requests_publish"].values()) == 3 + 1
    assert 0 < sum(found["requests_hit"].values()) <= 3
    assert 0 < sum(found["requests_miss"].values()) <= 3
    assert min(found["publish_ratio"], found["stage_ratio"]) > 0
    store = Store(f"{server.store}/costs")
    assert not any("bench-" in path for path in store.files(store.root))
