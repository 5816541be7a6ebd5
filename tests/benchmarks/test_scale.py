"""Commands on many artifacts are timed, and their requests counted on their way to a real server."""

from pathlib import Path

import pytest

from benchmarks.scale import scale
from nanodlm.store import Store
from tests.support import servers


def test_on_disk_commands_are_timed_on_whole_chains(tmp_path: Path) -> None:
    found = scale(str(tmp_path), artifacts=9, shards=0, repeats=1)
    assert list(found) == ["ls", "plan", "gc", "verify"]
    assert all(told["seconds"] > 0 for told in found.values())
    assert len(list(Store(str(tmp_path / "scale-9")))) == 9


@pytest.mark.slow
def test_on_a_bucket_every_request_is_counted(
    moto_server: servers.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moto_server.enter(monkeypatch)
    found = scale(f"{moto_server.store}/{tmp_path.name}", artifacts=6, shards=3, repeats=1)
    assert all(told["total"] == sum(told["requests"].values()) for told in found.values())
    assert found["ls"]["requests"]["GET"] == 6, "each manifest is read"
    assert found["finish"]["requests"]["PUT"] >= 2 * 3, "each shard and its record is written"
