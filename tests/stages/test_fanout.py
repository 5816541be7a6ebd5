"""Shards made one at a time, by whoever shares the store, give what the stage alone would have made."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from nanodlm.config import Config
from nanodlm.data import rows
from nanodlm.errors import Damaged
from nanodlm.stages import fanout, lookup, run
from nanodlm.store import Artifact, Store, cache
from nanodlm.upkeep import collect
from tests.support.helpers import flip, prose, tiny_config

PREPARED = ("download", "tokenizer", "split")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a corpus of several parts."""
    for i in range(4):
        (tmp_path / f"text-{i}.txt").write_text("\n".join(prose(130, seed=i)))
    return tiny_config(str(tmp_path / "text-*.txt"), part_mb=0.005, sample_by="line")


def prepared(config: Config, url: str) -> Store:
    store = Store(url)
    for name in PREPARED:
        run.run_stage(name, config, store)
    return store


def made(config: Config, store: Store) -> Artifact:
    return run.run_stage("shard", config, store)[0]


def missing(config: Config, store: Store) -> list[int]:
    with fanout.missing_shards(lookup.ready("shard", config, store), store) as numbers:
        return numbers


def build(config: Config, store: Store, index: int) -> bool:
    """Make one shard as a worker does that is told what it is made from."""
    return fanout.build_shard(config, store, index, lookup.ready("shard", config, store).input_fingerprints)


def test_shards_made_one_by_one_are_adopted_to_the_digest_of_the_stage_alone(config: Config, tmp_path: Path) -> None:
    alone = made(config, prepared(config, str(tmp_path / "alone")))
    store = prepared(config, str(tmp_path / "shared"))
    todo = missing(config, store)
    assert len(todo) > 3
    assert [build(config, store, i) for i in reversed(todo)] == [True] * len(todo)
    assert missing(config, store) == []
    finished = {p.name: p.stat().st_ino for p in Path(store.root).glob("shard/*/attempts/*/train-*")}
    artifact = made(config, store)
    assert artifact.digest == alone.digest
    assert artifact.metrics == alone.metrics
    assert {name: (artifact.local() / name).stat().st_ino for name in finished} == finished


def test_a_finished_shard_is_not_made_again_and_a_missing_one_is_left_to_the_stage(
    config: Config, tmp_path: Path
) -> None:
    store = prepared(config, str(tmp_path / "store"))
    assert build(config, store, 1)
    assert not build(config, store, 1)
    assert missing(config, store) == [i for i in range(len(missing(config, store)) + 1) if i != 1]
    artifact = made(config, store)
    assert missing(config, store) == []
    assert not build(config, store, 0)
    assert artifact.digest == made(config, prepared(config, str(tmp_path / "alone"))).digest


def test_workers_that_make_the_same_shards_at_once_change_no_bit(config: Config, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    todo = missing(config, prepared(config, url))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: build(config, Store(url), i), [*todo, *todo]))
    assert made(config, Store(url)).digest == made(config, prepared(config, str(tmp_path / "alone"))).digest


def test_a_damaged_shard_of_a_worker_is_made_again_by_the_stage(config: Config, tmp_path: Path) -> None:
    store = prepared(config, str(tmp_path / "store"))
    for i in missing(config, store):
        build(config, store, i)
    (damaged,) = Path(store.root).glob(f"shard/*/attempts/*/{rows.name(2)}")
    content = flip(damaged)
    assert (made(config, store).local() / rows.name(2)).read_bytes() == content


def test_a_worker_needs_no_source_and_fetches_its_part_of_the_corpus_alone(
    config: Config, tmp_path: Path, s3_environment: None
) -> None:
    boto3.client("s3").create_bucket(Bucket="worker")
    prepared(config, "s3://worker/store")
    store = Store("s3://worker/store")
    inputs = lookup.ready("shard", config, store).input_fingerprints
    for path in tmp_path.glob("text-*.txt"):
        path.unlink()
    shutil.rmtree(cache.cache_dir())
    assert fanout.build_shard(config, store, 1, inputs)
    fetched = (cache.cache_dir() / "processes").glob("*/download-*/*")
    assert [path.name for path in fetched] == ["part-00001.arrow"]


def test_what_workers_have_finished_is_not_collected_before_the_stage_has_adopted_it(
    config: Config, tmp_path: Path
) -> None:
    store = prepared(config, str(tmp_path / "store"))
    todo = missing(config, store)
    for i in todo:
        build(config, store, i)
    build(config, store, 0)
    assert list(collect.collect(store, grace=-1.0)) == []
    made(config, store)
    gone = list(collect.collect(store, grace=-1.0))
    assert [row["kind"] for row in gone] == ["attempt"] * len(todo)
    assert made(config, store).problems(deep=True) == {}


def test_while_shards_are_made_the_stage_is_leased_with_its_inputs(config: Config, tmp_path: Path) -> None:
    store = prepared(config, str(tmp_path / "store"))
    found = lookup.ready("shard", config, store)
    lease = store.path("shard", found.fingerprint, "lease.json")
    with fanout.missing_shards(found, store) as numbers:
        assert numbers
        assert store.read_json(lease)["inputs"] == found.input_fingerprints
        assert found.input_fingerprints.keys() == set(PREPARED)
    assert not Path(lease).exists()
    made(config, store)
    with fanout.missing_shards(found, store) as numbers:
        assert not Path(lease).exists()


def test_a_shard_of_a_damaged_corpus_is_refused(config: Config, tmp_path: Path) -> None:
    store = prepared(config, str(tmp_path / "store"))
    (part,) = Path(store.root).glob("download/*/attempts/*/part-00002.arrow")
    flip(part)
    assert build(config, store, 1)
    with pytest.raises(Damaged, match="part-00002"):
        build(config, store, 2)
