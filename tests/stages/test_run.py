import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nanodlm
from nanodlm.cli.main import main
from nanodlm.config import Config
from nanodlm.errors import Damaged, NanodlmError
from nanodlm.flows.pipeline import _stages
from nanodlm.stages import lookup as stages_lookup
from nanodlm.stages import run
from nanodlm.store import Artifact, Store, lease_events
from tests.support.helpers import flip, prose, tiny_config
from tests.support.training import tiny

DATA_STAGES = ("download", "tokenizer", "split", "shard")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of 400 documents, which `part_mb` of 0.02 makes several parts of."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(400)))
    return path


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
    return {
        lookup.stage.name: stages_lookup.why(lookup, partial(stages_lookup.of_stage, store=store))
        for lookup in lookups
        if lookup.artifact is None
    }


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
    assert first["download"][0].metrics["parts"] == 5


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


# Rebuilding


def test_a_rebuild_with_equal_bytes_leaves_the_manifest_as_it_was(store: Store, source: Path) -> None:
    config = tiny_config(source, part_mb=0.02)
    run_all(config, store)
    before = manifests(store)
    made: list[str] = []
    for name in DATA_STAGES:
        _, record = run.run_stage(name, config, store, rebuild=True, emit=lambda kind, **_: made.append(kind))
        assert record["status"] == "built"
    assert len(made) >= 4 + 4  # every part and every shard again
    assert manifests(store) == before
    assert statuses(run_all(config, store)) == ["cached"] * 4


def test_a_rebuild_replaces_a_damaged_artifact(store: Store, source: Path) -> None:
    config = tiny_config(source)
    shard, _ = run_all(config, store)["shard"]
    Path(shard.remote("validation.arrayrecord")).write_bytes(b"short")
    rebuilt, _ = run.run_stage("shard", config, store, rebuild=True)
    assert rebuilt.digest == shard.digest
    assert rebuilt.problems(deep=True) == {}
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
    assert repaired.problems(deep=True) == {}
    assert run.run_stage("shard", config, store)[1]["status"] == "cached"


def test_a_flipped_byte_in_an_input_stops_the_stage_that_reads_it(store: Store, source: Path) -> None:
    config = tiny_config(source)
    download, _ = run_all(config, store, ("download", "tokenizer"))["download"]
    flip(Path(download.remote("part-00000.arrow")))
    with pytest.raises(Damaged, match=r"the download artifact is damaged: part-00000\.arrow has been altered"):
        run.run_stage("split", config, store)
    assert [stage for stage, _ in store] == ["download", "tokenizer"]


# Missing inputs


def test_a_stage_whose_inputs_are_missing_names_them_and_the_command(store: Store, source: Path) -> None:
    config = tiny_config(source)
    with pytest.raises(NanodlmError, match=r"split needs download and tokenizer, .*run --until tokenizer`"):
        stages_lookup.ready("split", config, store)
    run_all(config, store, ("download", "tokenizer"))
    with pytest.raises(NanodlmError, match=r"shard needs split, which .*/store does not hold .*run --until split`"):
        run.run_stage("shard", config, store)


# What can be known before


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"data": {"source": "a.txt", "val_tokens": 10}}, "one document, .* last tenth is held out"),
        (
            {"data": {"source": "a.txt", "val_tokens": 900, "sample_by": "line"}},
            "lower --data.val_tokens or leave it out",
        ),
        (
            {"data": {"source": "a.txt"}, "exp": {"use_wandb": True}},
            r"pip install -c constraints\.txt -e '\.\[wandb\]'",
        ),
        ({"data": {"source": "a.pdf"}}, "files must end in .txt"),
    ],
    ids=["one document", "too small", "no package", "suffix"],
)
def test_what_cannot_be_is_said_before_a_server_is_started_or_anything_is_built(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    groups: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a text. " * 100)
    Path("a.pdf").touch()
    config = Config().replace(**groups)
    with pytest.raises(SystemExit):
        main(["run", config.model_dump_json(), "--store", store.root])
    captured = capsys.readouterr()
    assert re.search(says, captured.err)
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    for start in (lambda: run.train(config, store.root), lambda: _stages(config, store.root, "sample", None)):
        with pytest.raises(NanodlmError, match=says):
            start()
    assert list(store) == []


# A source whose files are gone


def test_what_was_downloaded_is_used_when_the_files_are_gone(
    store: Store, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(source)
    before = run_all(config, store)
    source.unlink()
    told: list[str] = []
    for name in DATA_STAGES:
        artifact, record = run.run_stage(name, config, store, emit=lambda _, **fields: told.append(fields["text"]))
        assert (artifact.uri, record["status"]) == (before[name][0].uri, "cached")
    name = before["download"][0].name
    says = f"the files of {source} are gone: {name} is used, which was made of them on"
    assert [text.startswith(says) for text in told] == [True] * 4
    assert statuses(run_all(config.replace(data={"val_tokens": 900}), store)) == ["cached", "cached", "built", "built"]
    words = [config.model_dump_json(), "--store", store.root]
    with pytest.raises(SystemExit, match="0"):
        main(["plan", *words])
    assert f"reuse  {before['download'][0].fingerprint[:12]}  the files of {source} are gone" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["run", *words, "--until", "shard"])  # all is there, so no server is started
    assert f"the files of {source} are gone" in capsys.readouterr().out


def test_without_a_download_of_just_these_settings_files_that_are_gone_are_missed_as_ever(
    store: Store, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(source)
    run.run_stage("download", config, store)
    source.unlink()
    for other in ({"part_mb": 3.0}, {"column": "body"}, {"source": "b.txt"}, {"source": [str(source), "b.txt"]}):
        with pytest.raises(NanodlmError, match="no file matches"):
            run.train(config.replace(data=other), store.root)
    for words in (["--data.source", "b.txt"], ["--rebuild", "download"]):
        with pytest.raises(SystemExit):
            main(["run", config.model_dump_json(), "--store", store.root, *words])
        captured = capsys.readouterr()
        assert "no file matches" in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)
    with pytest.raises(NanodlmError, match="no file matches"):
        run.run_stage("download", config, store, rebuild=True)


def test_a_source_that_is_partly_gone_is_another(store: Store, source: Path) -> None:
    more = source.with_name("more.jsonl")
    more.write_text(json.dumps({"text": "One more."}) + "\n")
    run.run_stage("download", tiny_config(str(source.parent / "*.jsonl")), store)
    run.run_stage("download", tiny_config([str(source), str(more)]), store)
    more.unlink()
    assert run.run_stage("download", tiny_config(str(source.parent / "*.jsonl")), store)[1]["status"] == "built"
    with pytest.raises(NanodlmError, match=r"no file matches .*more\.jsonl"):
        run.run_stage("download", tiny_config([str(source), str(more)]), store)


def test_of_several_downloads_of_files_that_are_gone_none_is_guessed(store: Store, source: Path) -> None:
    config = tiny_config(source)
    names = {run.run_stage("download", config, store)[0].name}
    source.write_text(json.dumps({"text": "Quite another text."}) + "\n")
    names.add(run.run_stage("download", config, store)[0].name)
    source.unlink()
    with pytest.raises(NanodlmError) as caught:
        run.run_stage("split", config, store)
    said = str(caught.value)
    differ = f"{' and '.join(sorted(names))} differ: `nanodlm rm` the wrong ones, or bring the files back"
    assert said == f"the files of {source} are gone, and {differ}"


def test_a_training_alone_needs_no_source(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(prose(400)))
    config = tiny(data={"source": str(path), "sample_by": "line", "val_tokens": 1000})
    run_all(config, store)
    path.unlink()
    trained, record = run.run_stage("train", config, store)
    assert record["status"] == "built"
    assert nanodlm.train(config, store.root).uri == trained.uri
    lengthened = config.replace(train={"max_steps": 13})
    told: list[str] = []
    assert nanodlm.train(lengthened, store.root, lambda _, **fields: told.append(fields.get("text", ""))).metrics
    assert any("are gone" in text for text in told)


# Two runs at once


def test_a_second_run_of_a_stage_waits_for_the_first_and_takes_its_result(store: Store, source: Path) -> None:
    building, waiting, go = (threading.Event() for _ in range(3))

    def emit(kind: str, **_: Any) -> None:
        if kind == "message":
            waiting.set()
        else:
            building.set()
            go.wait(60)

    def build() -> str:
        return run.run_stage("download", tiny_config(source), Store(store.root), emit=emit)[1]["status"]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build)
        try:
            assert building.wait(60)
            second = pool.submit(build)
            assert waiting.wait(60)
        finally:
            go.set()
        assert (first.result(60), second.result(60)) == ("built", "cached")
    assert len(list(Path(store.root).glob("download/*/attempts/*"))) == 1


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


def test_new_text_rebuilds_what_reads_it(store: Store, source: Path) -> None:
    config = tiny_config(source)
    run_all(config, store)
    with source.open("a") as file:
        file.write(json.dumps({"text": "One more."}) + "\n")
    assert statuses(run_all(config, store)) == ["built", "cached", "built", "built"]


def test_a_torn_manifest_is_refused_until_it_is_retired(store: Store, source: Path) -> None:
    config = tiny_config(source)
    artifact, _ = run.run_stage("download", config, store)
    Path(store.path("download", artifact.fingerprint, "manifest.json")).write_text("{")
    with pytest.raises(Damaged, match="holds no record"):
        run.run_stage("download", config, store)
    store.retire(("download", artifact.fingerprint))
    assert run.run_stage("download", config, store)[0].digest == artifact.digest
