import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nanodlm.config import Config
from nanodlm.errors import Damaged, NanodlmError
from nanodlm.stages import lookup as stages_lookup
from nanodlm.stages import run, table
from nanodlm.stages import why as stages_why
from nanodlm.store import Artifact, Store, lease_events
from tests.support.helpers import prose, tiny_config

DATA_STAGES = ("download", "tokenizer", "split", "shard")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of 400 documents, which `part_mb` of 0.02 makes four parts of."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(400)))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def run_all(config: Config, store: Store, names: tuple[str, ...] = DATA_STAGES) -> dict[str, tuple[Artifact, str]]:
    """Artifact and status of each stage."""
    found = {}
    for name in names:
        artifact, record = run.run_stage(name, config, store)
        found[name] = (artifact, record["status"])
    return found


def statuses(found: dict[str, tuple[Artifact, str]]) -> list[str]:
    return [status for _, status in found.values()]


def manifests(store: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(store.root).rglob("manifest.json"))}


def why(config: Config, store: Store) -> dict[str, str]:
    """For each data stage that would be built, why."""
    lookups = stages_lookup.look_up(config, store, until="shard")
    return {lookup.stage.name: stages_why.why(lookup, store) for lookup in lookups if lookup.artifact is None}


# Building and reusing


def test_a_second_run_finds_everything_the_first_has_built(store: Store, source: Path) -> None:
    config = tiny_config(source, part_mb=0.02)
    first = run_all(config, store)
    assert statuses(first) == ["built"] * 4
    before = manifests(store)
    second = run_all(config, store)
    assert statuses(second) == ["cached"] * 4
    assert manifests(store) == before
    assert [a.uri for a, _ in second.values()] == [a.uri for a, _ in first.values()]
    assert first["download"][0].metrics["parts"] == 4


def test_a_record_says_where_the_artifact_is(store: Store, source: Path) -> None:
    artifact, record = run.run_stage("download", tiny_config(source), store)
    assert record == {
        "stage": "download",
        "status": "built",
        "uri": artifact.uri,
        "fingerprint": artifact.fingerprint,
        "seconds": record["seconds"],
    }
    assert record["seconds"] >= 0


def test_a_manifest_tells_its_settings_and_its_inputs(store: Store, source: Path) -> None:
    found = run_all(tiny_config(source), store)
    manifest = found["shard"][0].manifest
    assert manifest["stage"] == "shard"
    assert manifest["parameters"] == {"seq_len": 32}
    assert manifest["inputs"] == {
        name: {"digest": found[name][0].digest, "fingerprint": found[name][0].fingerprint}
        for name in ("download", "tokenizer", "split")
    }
    assert {"nanodlm", "array-record", "tiktoken"} <= manifest["packages"].keys()


def test_what_does_not_determine_the_bytes_is_in_no_fingerprint(store: Store, source: Path, tmp_path: Path) -> None:
    run_all(tiny_config(source), store)
    moved = tmp_path / "moved" / "elsewhere.jsonl"
    moved.parent.mkdir()
    source.rename(moved)
    changed = tiny_config(moved, shuffle_seed=9).replace(
        exp={"run_name": "another", "save_every": 7}, train={"lr": 1e-5}, eval={"repeats": 3}
    )
    assert statuses(run_all(changed, store)) == ["cached"] * 4


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ({"model": {"seq_len": 16}}, ["shard"]),
        ({"data": {"val_tokens": 900}}, ["split", "shard"]),
        ({"data": {"split_seed": 1}}, ["split", "shard"]),
        ({"data": {"tokenizer": "gpt2"}}, ["tokenizer", "split", "shard"]),
    ],
    ids=str,
)
def test_a_changed_setting_rebuilds_what_depends_on_it_and_nothing_else(
    store: Store, source: Path, change: dict[str, Any], rebuilt: list[str]
) -> None:
    config = tiny_config(source)
    run_all(config, store)
    found = run_all(config.replace(**change), store)
    assert [name for name, (_, status) in found.items() if status == "built"] == rebuilt
    assert statuses(run_all(config, store)) == ["cached"] * 4  # the old ones are still there


def test_equal_bytes_from_other_settings_change_nothing_downstream(store: Store, source: Path, tmp_path: Path) -> None:
    config = tiny_config(source, part_mb=1.0)
    run_all(config, store)
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps({"extra": 1, "text": text}) + "\n" for text in prose(400)))
    found = run_all(tiny_config(again, part_mb=2.0), store)
    assert statuses(found) == ["built", "cached", "cached", "cached"]


def test_new_text_rebuilds_what_reads_it(store: Store, source: Path) -> None:
    config = tiny_config(source)
    run_all(config, store)
    with source.open("a") as file:
        file.write(json.dumps({"text": "One more."}) + "\n")
    assert statuses(run_all(config, store)) == ["built", "cached", "built", "built"]


# Why


def test_the_reason_names_the_field_and_both_values(store: Store, source: Path) -> None:
    config = tiny_config(source)
    found = run_all(config, store)
    reasons = why(config.replace(model={"seq_len": 16}), store)
    assert reasons == {"shard": f"seq_len: 32 -> 16 (against {found['shard'][0].fingerprint[:12]})"}
    reasons = why(config.replace(data={"val_tokens": 900, "split_seed": 3}), store)
    assert reasons["split"].startswith("split_seed: 0 -> 3; val_tokens: 1000 -> 900 (against ")
    assert reasons["shard"] == "an input is not built yet"


def test_the_reason_is_taken_from_the_most_similar_artifact(store: Store, source: Path) -> None:
    config = tiny_config(source)
    # Of several seeds, so that the nearest is neither the first nor the last in the store for every one of them.
    nearest = {
        seed: run_all(config.replace(data={"split_seed": seed}), store, DATA_STAGES[:3])["split"][0].fingerprint
        for seed in range(3)
    }
    for seed, fingerprint in nearest.items():
        reasons = why(config.replace(data={"split_seed": seed, "val_tokens": 500}), store)
        assert reasons["split"] == f"val_tokens: 1000 -> 500 (against {fingerprint[:12]})"


def test_the_reason_names_an_input_that_has_changed(store: Store, source: Path) -> None:
    config = tiny_config(source)
    old = run_all(config, store)["download"][0].digest
    source.write_text(json.dumps({"text": "Quite another text."}) + "\n")
    new, _ = run.run_stage("download", config, store)
    assert why(config, store)["split"].startswith(f"input.download: {old[:12]}… -> {new.digest[:12]}… (against ")


def test_the_reason_in_an_empty_store_is_that_there_is_nothing(store: Store, source: Path) -> None:
    reasons = why(tiny_config(source), store)
    assert reasons["download"] == reasons["tokenizer"] == "nothing like it has been built yet"
    assert reasons["split"] == reasons["shard"] == "an input is not built yet"


def test_looking_up_writes_nothing(store: Store, source: Path) -> None:
    why(tiny_config(source), store)
    assert not Path(store.root).exists()


# Rebuilding


def test_a_rebuild_with_equal_bytes_leaves_the_manifest_as_it_was(store: Store, source: Path) -> None:
    config = tiny_config(source)
    run_all(config, store)
    before = manifests(store)
    for name in DATA_STAGES:
        _, record = run.run_stage(name, config, store, rebuild=True)
        assert record["status"] == "built"
    assert manifests(store) == before
    assert statuses(run_all(config, store)) == ["cached"] * 4


def test_a_rebuild_makes_every_part_again(store: Store, source: Path) -> None:
    config = tiny_config(source, part_mb=0.02)
    run_all(config, store)
    made: list[int] = []
    run.run_stage("download", config, store, rebuild=True, emit=lambda kind, **fields: made.append(1))
    assert len(made) == 4


def test_a_rebuild_replaces_a_damaged_artifact(store: Store, source: Path) -> None:
    config = tiny_config(source)
    shard, _ = run_all(config, store)["shard"]
    Path(shard.remote("validation.arrayrecord")).write_bytes(b"short")
    rebuilt, _ = run.run_stage("shard", config, store, rebuild=True)
    assert rebuilt.digest == shard.digest
    assert rebuilt.problems(deep=True) == []
    assert run.run_stage("shard", config, store)[1]["status"] == "cached"


# Damage


def test_a_truncated_shard_is_refused_and_after_repair_only_it_is_made_again(store: Store, source: Path) -> None:
    config = tiny_config(source, part_mb=0.02)
    shard, _ = run_all(config, store)["shard"]
    names = [f"train-{i:05d}.arrayrecord" for i in range(4)]
    inodes = {name: os.stat(shard.remote(name)).st_ino for name in names}
    with open(shard.remote(names[2]), "r+b") as file:
        file.truncate(1000)
    for refuse in (
        lambda: list(stages_lookup.look_up(config, store)),
        lambda: stages_lookup.ready("shard", config, store),
        lambda: stages_lookup.ready("train", config, store),
        lambda: run.run_stage("shard", config, store),
    ):
        with pytest.raises(Damaged, match=r"train-00002\.arrayrecord has 1000 bytes, not .*verify .* --repair"):
            refuse()
    store.retire(("shard", shard.fingerprint))
    repaired, record = run.run_stage("shard", config, store)
    assert record["status"] == "built"
    assert repaired.digest == shard.digest
    after = {name: os.stat(repaired.remote(name)).st_ino for name in names}
    assert [name for name in names if after[name] != inodes[name]] == [names[2]]
    assert repaired.problems(deep=True) == []
    assert run.run_stage("shard", config, store)[1]["status"] == "cached"


def test_a_flipped_byte_in_an_input_stops_the_stage_that_reads_it(store: Store, source: Path) -> None:
    config = tiny_config(source)
    download, _ = run_all(config, store, ("download", "tokenizer"))["download"]
    part = Path(download.remote("part-00000.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(Damaged, match=r"the download artifact is damaged: part-00000\.parquet has been altered"):
        run.run_stage("split", config, store)
    assert [stage for stage, _ in store] == ["download", "tokenizer"]


def test_a_torn_manifest_is_refused_until_it_is_retired(store: Store, source: Path) -> None:
    config = tiny_config(source)
    artifact, _ = run.run_stage("download", config, store)
    Path(store.path("download", artifact.fingerprint, "manifest.json")).write_text("{")
    with pytest.raises(Damaged, match="is not a manifest"):
        run.run_stage("download", config, store)
    store.retire(("download", artifact.fingerprint))
    assert run.run_stage("download", config, store)[0].digest == artifact.digest


# Missing inputs


def test_a_stage_whose_inputs_are_missing_names_them_and_the_command(store: Store, source: Path) -> None:
    config = tiny_config(source)
    with pytest.raises(NanodlmError, match=r"split needs download and tokenizer, .*run --until tokenizer`"):
        stages_lookup.ready("split", config, store)
    run_all(config, store, ("download", "tokenizer"))
    with pytest.raises(NanodlmError, match=r"shard needs split, which .*/store does not hold .*run --until split`"):
        run.run_stage("shard", config, store)


def test_a_ready_stage_gets_its_inputs_and_no_others(store: Store, source: Path) -> None:
    config = tiny_config(source)
    found = run_all(config, store)
    lookup = stages_lookup.ready("shard", config, store)
    assert lookup.input_fingerprints == {
        name: found[name][0].fingerprint for name in ("download", "tokenizer", "split")
    }
    assert lookup.fingerprint == found["shard"][0].fingerprint
    with pytest.raises(KeyError):
        stages_lookup.ready("no such stage", config, store)


@pytest.mark.parametrize("name", list(table.STAGES))
def test_every_stage_reads_only_stages_before_it(name: str) -> None:
    before = list(table.STAGES)[: list(table.STAGES).index(name)]
    for kind in ("bpe", "bytes"):
        assert set(table.STAGES[name].inputs(tiny_config(tokenizer=kind))) <= set(before)


def test_the_stages_are_those_of_the_pipeline_in_order() -> None:
    assert table.NAMES == ("download", "tokenizer", "split", "shard", "train", "evaluate", "sample")
    assert table.until("shard") == DATA_STAGES
    assert table.until("sample") == (*table.NAMES, "report")


# Two runs at once

BUILD_DOWNLOAD = """
import sys, time
from pathlib import Path
from nanodlm.config import Config
from nanodlm.stages.run import run_stage
from nanodlm.store import Store

config, folder = Config.model_validate_json(sys.argv[1]), Path(sys.argv[2])

def emit(kind, **fields):
    if kind == "message":
        (folder / "waiting").touch()
        return
    (folder / "building").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)

print(run_stage("download", config, Store(sys.argv[3]), emit=emit)[1]["status"])
"""


def appears(path: Path, *processes: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert all(process.poll() is None for process in processes), "a process ended too early"
        time.sleep(0.02)


def test_a_second_run_of_a_stage_waits_for_the_first_and_takes_its_result(
    store: Store, source: Path, tmp_path: Path
) -> None:
    config = tiny_config(source)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BUILD_DOWNLOAD, config.model_dump_json(), str(tmp_path), store.root]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with ExitStack() as stack:
        first = stack.enter_context(start())
        stack.callback((tmp_path / "go").touch)  # whatever fails below, the processes end
        appears(tmp_path / "building", first)
        second = stack.enter_context(start())
        stack.callback((tmp_path / "go").touch)
        appears(tmp_path / "waiting", first, second)
        (tmp_path / "go").touch()
        assert first.communicate(timeout=60)[0] == "built\n"
        assert second.communicate(timeout=60)[0] == "cached\n"
    attempts = list(Path(store.root).glob("download/*/attempts/*"))
    assert len(attempts) == 1


def test_the_lease_tells_others_how_far_a_stage_is_and_the_artifact_knows_nothing_of_it(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanodlm.store.lease.LEASE_SECONDS", 0.3)
    seen = []

    def emit(kind: str, **fields: Any) -> None:
        (lease,) = Path(store.root).glob("*/*/lease.json")
        address, deadline = lease.parts[-3:-1], time.monotonic() + 5
        while lease_events(store, *address).get(kind) != fields and time.monotonic() < deadline:
            time.sleep(0.02)
        seen.append(lease_events(store, *address).get(kind) == fields)

    artifact, _ = run.run_stage("download", tiny_config(source), store, emit=emit)
    assert seen
    assert all(seen)
    assert lease_events(store, "download", artifact.fingerprint) == {}
    assert not artifact.problems(deep=True)
