"""Keeping a store: damage is found and mended, what nobody needs goes, and what is copied or adopted is the same."""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.cli import main
from nanodlm.config import Config
from nanodlm.data import download
from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.stages import run, why
from nanodlm.store import Artifact, Store, hold_lease, new_attempt, sealed
from nanodlm.store.files import Storage
from nanodlm.upkeep import adopt, collect, copy, verify
from tests.support.helpers import committed, fill, identity, prose, tiny_config
from tests.training.test_loop import tiny

CHAIN = ["download", "tokenizer", "split", "shard", "train", "sample"]
EVERYTHING = -60.0  # a grace that nothing is young enough for


def small(source: Path) -> Config:
    """A configuration that trains for an instant."""
    return tiny(data={"source": str(source), "val_tokens": 1000, "part_mb": 0.02}, exp={"save_every": 6, "val_rows": 0})


def build(config: Config, store: Store, names: list[str] = CHAIN) -> dict[str, Artifact]:
    return {name: run.run_stage(name, config, store)[0] for name in names}


def statuses(config: Config, store: Store, names: list[str] = CHAIN) -> dict[str, str]:
    return {name: run.run_stage(name, config, store)[1]["status"] for name in names}


@dataclass(frozen=True)
class Made:
    """A store and what was built in it."""

    store: Store
    config: Config
    artifacts: dict[str, Artifact]

    def check(self, *, deep: bool = False, repair: bool = False, of: str = "sample") -> dict[str, verify.Checked]:
        """What is said of each artifact in a chain, by stage."""
        chain = verify.chain(self.store, of, self.artifacts[of].fingerprint)
        return {found.stage: found for found in verify.check(self.store, chain, deep=deep, repair=repair)}

    def file(self, stage: str, name: str) -> Path:
        return Path(self.artifacts[stage].remote(name))

    def first(self, stage: str, pattern: str) -> Path:
        return sorted(self.file(stage, "parts").parent.glob(pattern))[0]


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store with everything from the download to a sample."""
    folder = tmp_path_factory.mktemp("master")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(400)))
    config, store = small(folder / "corpus.jsonl"), Store(str(folder / "store"))
    return Made(store, config, build(config, store))


@pytest.fixture
def made(master: Made, tmp_path: Path) -> Made:
    """A copy of that store, and of its source, to be damaged."""
    shutil.copytree(master.store.root, tmp_path / "store")
    shutil.copy(master.config.data.source[0], tmp_path / "corpus.jsonl")
    store = Store(str(tmp_path / "store"))
    config = master.config.replace(data={"source": str(tmp_path / "corpus.jsonl")})
    for artifact in master.artifacts.values():  # it names this copy of the source
        path = Path(store.path(artifact.stage, artifact.fingerprint, "manifest.json"))
        manifest = {**artifact.manifest, "config": config.model_dump(mode="json")}
        path.write_text(json.dumps(sealed(manifest)))
    return Made(store, config, {name: store.open(a.uri) for name, a in master.artifacts.items()})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def remote() -> Iterator[Store]:
    yield Store("memory://upkeep/runs")
    fsspec.filesystem("memory").rm("/upkeep", recursive=True)


def flip(path: Path) -> bytes:
    """Change the last byte of a file; what it was."""
    before = path.read_bytes()
    path.unlink()  # it may be another name of the same file
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    return before


def made_from(store: Store, stage: str, fingerprint: str, *sources: Artifact, age: float = 0.0) -> Artifact:
    """An artifact with one file, made so long ago from these."""
    with new_attempt(store, stage, fingerprint) as attempt:
        fill(attempt, {"x.bin": fingerprint.encode()})
        attempt.finish("x", ["x.bin"])
        inputs = {source.stage: {"digest": source.digest, "fingerprint": source.fingerprint} for source in sources}
        artifact = attempt.commit(identity={**identity(stage), "inputs": inputs}, metrics={})
    then = time.time() - age
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(then))
    store.write_json(store.path(stage, fingerprint, "manifest.json"), sealed({**artifact.manifest, "created": created}))
    for path in Path(store.path(stage, fingerprint)).rglob("*"):
        os.utime(path, (then, then))
    return store.open(f"{stage}/{fingerprint}")


def files(store: Store) -> dict[str, bytes]:
    root = Path(store.root)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def left(store: Store) -> list[str]:
    return [fingerprint for _, fingerprint in store]


def collected(store: Store, **options: Any) -> list[tuple[str, str]]:
    """Kind of what a collection removed, and its path in the store."""
    rows = list(collect.collect(store, **options))
    return [(row["kind"], row["uri"].removeprefix(store.uri() + "/").partition("/attempts")[0]) for row in rows]


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    """What a command prints, and says on standard error."""
    with pytest.raises(SystemExit) as ended:
        main.main(list(words))
    out, error = capsys.readouterr()
    assert ended.value.code == code, error
    assert len(error.splitlines()) == (code != 0), error
    return out, error


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """The object that `--json` prints."""
    return json.loads(said(capsys, *words, "--json", code=code)[0].splitlines()[-1])


def flags(config: Config) -> list[str]:
    """A configuration as a command line gives it: as the file that a run has written."""
    path = Path(config.data.source[0]).with_name("config.json")
    path.write_text(config.model_dump_json())
    return [str(path)]


# Checking and repairing


def test_the_chain_of_a_sample_goes_down_to_the_data_in_the_order_of_the_stages(master: Made) -> None:
    sample = master.artifacts["sample"]
    chain = verify.chain(master.store, "sample", sample.fingerprint)
    assert chain == [(name, master.artifacts[name].fingerprint) for name in CHAIN]
    assert [found.problems for found in master.check(deep=True).values()] == [[]] * len(CHAIN)


def test_a_deep_check_shows_how_far_it_is(master: Made) -> None:
    told = []
    shard = ("shard", master.artifacts["shard"].fingerprint)
    list(
        verify.check(master.store, [shard], deep=True, emit=lambda kind, **fields: told.append({"kind": kind} | fields))
    )
    assert len(told) == len(master.artifacts["shard"].manifest["files"])
    assert (told[-1]["kind"], told[-1]["unit"]) == ("progress", "MB of shard read")
    assert told[-1]["done"] == pytest.approx(told[-1]["total"])


def test_a_repair_builds_the_bad_shard_alone_and_what_depends_on_it_stays_cached(made: Made) -> None:
    bad = made.first("shard", "train-*")
    good = {path.name: path.stat().st_ino for path in bad.parent.glob("train-*") if path != bad}
    other = {stage: a.manifest for stage, a in made.artifacts.items() if stage != "shard"}
    before = flip(bad)
    found = made.check(deep=True, repair=True)
    assert [stage for stage, checked in found.items() if checked.repaired] == ["shard"]
    shard = made.store.open(made.artifacts["shard"].uri)
    assert good
    assert {name: Path(shard.remote(name)).stat().st_ino for name in good} == good
    assert Path(shard.remote(bad.name)).read_bytes() == before
    assert {stage: made.store.open(a.uri).manifest for stage, a in made.artifacts.items() if stage != "shard"} == other
    assert set(statuses(made.config, made.store).values()) == {"cached"}


def test_an_input_is_repaired_before_what_is_built_from_it(made: Made) -> None:
    digests = {stage: artifact.digest for stage, artifact in made.artifacts.items()}
    flip(made.first("download", "part-*"))
    flip(made.first("shard", "train-*"))
    found = made.check(deep=True, repair=True)
    assert [stage for stage, checked in found.items() if checked.repaired] == ["download", "shard"]
    assert {stage: made.store.open(a.uri).digest for stage, a in made.artifacts.items()} == digests
    assert not any(checked.problems for checked in made.check(deep=True).values())


def test_a_damaged_checkpoint_is_trained_again_from_the_one_before(made: Made) -> None:
    digest = made.artifacts["train"].digest
    damaged = sorted(p for p in made.file("train", "checkpoints/step_000012").rglob("*") if p.is_file())
    for path in damaged:
        flip(path) if path.stat().st_size else None
    found = made.check(deep=True, repair=True, of="train")
    assert found["train"].repaired
    train = made.store.open(made.artifacts["train"].uri)
    assert train.metrics["resumed_from_update"] == 6
    assert train.digest == digest
    assert statuses(made.config, made.store)["sample"] == "cached"


def test_a_torn_manifest_whose_settings_nobody_knows_is_set_aside_and_says_so(made: Made) -> None:
    path = Path(made.store.path("sample", made.artifacts["sample"].fingerprint, "manifest.json"))
    path.write_bytes(path.read_bytes()[:100])
    found = made.check()
    assert list(found) == ["sample"], "what it was made from cannot be known"
    assert "is not a manifest" in found["sample"].problems[0]
    assert path.exists()
    found = made.check(repair=True)
    assert not found["sample"].repaired
    assert "it was set aside: `nanodlm run` with those it was made with rebuilds it" in found["sample"].problems[1]
    assert not path.exists()
    assert statuses(made.config, made.store) == {**dict.fromkeys(CHAIN, "cached"), "sample": "built"}


@pytest.mark.parametrize("torn", [b'{"schema": 1', None], ids=["torn", "gone"])
def test_a_manifest_that_is_torn_or_gone_is_made_again_with_the_settings_of_what_was_made_from_it(
    made: Made, torn: bytes | None
) -> None:
    split = made.artifacts["split"]
    path = Path(made.store.path("split", split.fingerprint, "manifest.json"))
    path.write_bytes(torn) if torn else path.unlink()
    found = made.check(repair=True)
    assert [stage for stage, checked in found.items() if checked.repaired] == ["split"]
    assert made.store.open(split.uri).digest == split.digest


def test_without_the_source_a_download_is_not_repaired_and_nothing_is_removed(made: Made) -> None:
    Path(made.config.data.source[0]).unlink()
    flip(made.first("download", "part-*"))
    before = files(made.store)
    found = made.check(deep=True, repair=True)
    assert not found["download"].repaired
    assert "not repaired: no file matches" in found["download"].problems[1]
    assert files(made.store) == before


def test_without_the_source_a_shard_is_repaired_from_the_download(made: Made) -> None:
    Path(made.config.data.source[0]).unlink()
    flip(made.first("shard", "train-*"))
    assert made.check(deep=True, repair=True)["shard"].repaired
    assert not any(checked.problems for checked in made.check(deep=True).values())


def test_what_is_made_from_something_damaged_beyond_repair_keeps_its_manifest(made: Made) -> None:
    Path(made.config.data.source[0]).unlink()
    flip(made.first("download", "part-*"))
    flip(made.first("shard", "train-*"))
    found = made.check(deep=True, repair=True)
    assert not any(checked.repaired for checked in found.values())
    assert "not repaired: the download artifact is damaged" in found["shard"].problems[1]
    assert len(left(made.store)) == len(CHAIN)


def test_an_artifact_whose_input_was_rebuilt_with_other_bytes_says_so(store: Store) -> None:
    first = made_from(store, "shard", "f1")
    made_from(store, "train", "f2", first)
    store.retire(("shard", "f1"))
    committed(store, {"x.bin": b"other"}, fingerprint="f1")
    problems = {found.stage: found.problems for found in verify.check(store, [("shard", "f1"), ("train", "f2")])}
    assert problems == {"shard": [], "train": ["it was made from another shard than the one that is there now"]}


def test_an_artifact_out_of_its_place_is_not_set_aside(store: Store) -> None:
    """As a backup within the store, or a renamed folder, would be."""
    committed(store, {"x.bin": b"x"})
    shutil.copytree(store.path("shard"), store.path("shard.bak"))
    (_, found) = verify.check(store, verify.in_order(store), repair=True)
    assert (found.stage, found.repaired) == ("shard.bak", False)
    assert "it is not damaged but out of place: move its folder to shard/f0, or remove it" in found.problems[1]
    assert Path(store.path("shard.bak", "f0", "manifest.json")).exists()


def test_of_two_repairs_the_second_keeps_what_the_first_has_made(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    split = made.artifacts["split"]
    path = Path(made.store.path("split", split.fingerprint, "manifest.json"))
    good = path.read_bytes()
    path.write_bytes(b"{")
    lease, retired = verify.hold_lease, []

    def waited(store: Store, *args: Any, **kwargs: Any) -> Any:
        path.write_bytes(good)  # the first commits while the second waits for its lease
        return lease(store, *args, **kwargs)

    monkeypatch.setattr(verify, "hold_lease", waited)
    monkeypatch.setattr(Store, "retire", lambda _, item: retired.append(item))
    assert made.check(repair=True)["split"].repaired
    assert retired == []
    assert path.read_bytes() == good


def test_verify_of_a_store_names_what_its_artifacts_were_made_from_and_is_gone(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(made.store.path("split", made.artifacts["split"].fingerprint, "manifest.json")).unlink()
    out, _ = said(capsys, "verify", "--store", made.store.uri(), code=1)
    assert f"DAMAGED  {made.artifacts['split'].uri}\n         its manifest is missing" in out
    out, _ = said(capsys, "verify", "--store", made.store.uri(), "--repair")
    assert f"REPAIRED {made.artifacts['split'].uri}" in out


def test_verify_says_what_is_wrong_and_what_was_mended(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    sample, shard = made.artifacts["sample"].uri, made.artifacts["shard"].uri
    out, _ = said(capsys, "verify", sample)
    assert out.splitlines()[-1] == "6 artifacts: every file has its size"
    flip(made.first("shard", "train-*"))
    out, error = said(capsys, "verify", sample, "--deep", code=1)
    assert f"\nDAMAGED  {shard}\n         train-00000.arrayrecord has been altered" in out
    assert error == "nanodlm: 1 of 6 artifacts are damaged: add --repair to build again what is bad\n"
    told_ = told(capsys, "verify", sample, "--deep", code=1)
    assert [row["uri"] for row in told_["artifacts"] if row["problems"]] == [shard]
    out, _ = said(capsys, "verify", "--store", made.store.uri(), "--deep", "--repair")
    assert f"REPAIRED {shard}" in out
    assert out.endswith("6 artifacts, 1 repaired: every file has its sha256\n")
    assert said(capsys, "verify", sample, "--deep")[0].endswith("6 artifacts: every file has its sha256\n")
    assert told(capsys, "verify", sample) == {
        "artifacts": [{"uri": made.artifacts[n].uri, "problems": [], "repaired": False} for n in CHAIN],
        "damaged": 0,
        "repaired": 0,
    }


def test_verify_of_nothing_is_one_clear_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _, error = said(capsys, "verify", store.uri("train", "f0"), code=1)
    assert f"no artifact at {store.uri('train', 'f0')}" in error
    assert "no artifacts in" in said(capsys, "verify", "--store", store.uri())[0]


# Listing


def test_ls_shows_age_size_and_what_each_was_made_from(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys, "ls", "--store", made.store.uri())["artifacts"]
    assert [row["stage"] for row in rows] == CHAIN
    train = made.artifacts["train"]
    assert rows[4]["inputs"] == {n: made.artifacts[n].fingerprint for n in ("shard", "tokenizer")}
    assert rows[4]["bytes"] == sum(file["size"] for file in train.manifest["files"])
    assert 0 <= rows[4]["age_seconds"] < 3600
    out, _ = said(capsys, "ls", "--store", made.store.uri())
    line = next(line for line in out.splitlines() if line.endswith(train.uri))
    assert line.split()[0] == "train"
    assert line.split()[3] in ("B", "kB", "MB")
    assert f"from train {train.fingerprint[:12]}" in out
    assert out.splitlines()[-1].startswith("6 artifacts, ")
    columns = {line.index(made.store.root) for line in out.splitlines()[:-1] if made.store.root in line}
    assert len(columns) == 1, "addresses line up"


def test_show_says_where_each_input_lies_and_which_has_gone(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    sample, split = made.artifacts["sample"], made.artifacts["split"]
    out, _ = said(capsys, "show", sample.uri)
    assert [line.split()[0] for line in out.partition("lineage\n")[2].splitlines()[:5]] == CHAIN[:5]
    assert all(artifact.uri in out for artifact in made.artifacts.values())
    assert " ago) in " in out
    made.store.retire(("split", split.fingerprint))
    assert f"{split.uri}  (not there any more)" in said(capsys, "show", sample.uri)[0]
    assert told(capsys, "show", sample.uri)["digest"] == sample.digest


# Collecting


def test_show_of_a_good_artifact_says_which_of_those_it_was_made_from_are_damaged(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = made.artifacts["tokenizer"]
    Path(made.store.path("tokenizer", tokenizer.fingerprint, "manifest.json")).write_text("{")
    out, _ = said(capsys, "show", made.artifacts["shard"].uri)
    assert f"{tokenizer.uri}  (damaged)\n" in out
    assert "\nfiles\n" in out


def test_a_collection_without_wishes_keeps_every_artifact(made: Made) -> None:
    assert collected(made.store, grace=EVERYTHING) == []
    assert len(left(made.store)) == len(CHAIN)


def test_a_dry_run_removes_nothing_and_says_what_would_go(store: Store) -> None:
    shard = made_from(store, "shard", "f1", age=9000)
    for number, age in ((2, 8000), (3, 7500)):
        made_from(store, "train", f"f{number}", shard, age=age)
    before = files(store)
    would = collected(store, keep_last=1, dry_run=True)
    assert would == [("artifact", "train/f2")]
    assert files(store) == before
    assert collected(store, keep_last=1) == would


def test_the_newest_results_are_kept_with_all_they_were_made_from_and_what_others_share(store: Store) -> None:
    download = made_from(store, "download", "d", age=9000)
    used, unused = (made_from(store, "shard", name, download, age=8900) for name in ("used", "unused"))
    made_from(store, "train", "old", used, age=8000)
    made_from(store, "train", "oldest", unused, age=8500)
    made_from(store, "train", "new", used, age=7000)
    assert sorted(collected(store, keep_last=1)) == [
        ("artifact", "shard/unused"),
        ("artifact", "train/old"),
        ("artifact", "train/oldest"),
    ]
    assert sorted(left(store)) == ["d", "new", "used"]


def test_older_results_are_given_up_unless_they_are_among_the_last(store: Store) -> None:
    for name, age in (("a", 90_000), ("b", 80_000), ("c", 10_000)):
        made_from(store, "train", name, age=age)
    assert collected(store, older_than=86_400, keep_last=2, dry_run=True) == [("artifact", "train/a")]
    assert collected(store, older_than=50_000, keep_last=1) == [("artifact", "train/a"), ("artifact", "train/b")]
    assert left(store) == ["c"]


def test_what_changed_within_the_grace_is_left_alone(store: Store) -> None:
    shard = made_from(store, "shard", "f1", age=9000)
    made_from(store, "train", "young", shard, age=60)
    made_from(store, "train", "old", age=9000)
    assert collected(store, keep_last=0) == [("artifact", "train/old")]
    assert sorted(left(store)) == ["f1", "young"]


def test_files_of_a_retired_artifact_stay_for_the_grace_and_a_run_may_adopt_them(store: Store) -> None:
    old = made_from(store, "train", "old", age=9000)
    assert collected(store, keep_last=0) == [("artifact", "train/old")]
    assert store.find("train", "old") is None
    assert collected(store) == [], "whoever reads it may finish"
    with new_attempt(store, "train", "old") as attempt:
        assert attempt.adopt("x") == {}
        assert attempt.commit(identity=identity("train"), metrics={}).digest == old.digest
    assert collected(store, grace=EVERYTHING) == [("attempt", "train/old")]
    assert store.open("train/old").problems(deep=True) == []


def test_files_of_a_retired_artifact_go_after_the_grace(store: Store) -> None:
    made_from(store, "train", "old", age=9000)
    assert collected(store, keep_last=0) == [("artifact", "train/old")]
    retired = Path(store.path("train", "old", "retired.json"))
    os.utime(retired, (time.time() - 7200,) * 2)
    assert collected(store) == [("attempt", "train/old")]
    assert not list(Path(store.root).rglob("x.bin"))


def test_what_a_run_has_begun_after_a_retirement_is_not_abandoned(store: Store) -> None:
    made_from(store, "train", "old", age=9000)
    assert collected(store, keep_last=0, grace=EVERYTHING) == [("artifact", "train/old"), ("attempt", "train/old")]
    retired = Path(store.path("train", "old", "retired.json"))
    os.utime(retired, (time.time() - 7200,) * 2)
    with new_attempt(store, "train", "old") as attempt:
        fill(attempt, {"x.bin": b"x"})
        attempt.finish("x", ["x.bin"])
    assert collected(store, grace=EVERYTHING) == [], "a run would go on from it"


def test_what_a_run_under_way_reads_is_kept(store: Store) -> None:
    shard = made_from(store, "shard", "f1", age=9000)
    made_from(store, "shard", "f2", age=9000)
    with hold_lease(store, "train", "t", inputs={"shard": shard.fingerprint}):
        assert collected(store, keep_last=0) == [("artifact", "shard/f2")]
    assert collected(store, keep_last=0) == [("artifact", "shard/f1")]


def test_files_that_a_run_under_way_reads_stay_although_their_manifest_was_given_up_before(store: Store) -> None:
    shard = made_from(store, "shard", "f1", age=9000)
    assert collected(store, keep_last=0) == [("artifact", "shard/f1")]
    os.utime(store.path("shard", "f1", "retired.json"), (time.time() - 7200,) * 2)
    with hold_lease(store, "train", "t", inputs={"shard": shard.fingerprint}):
        assert collected(store) == []
    assert collected(store) == [("attempt", "shard/f1")]


def test_files_that_others_took_the_place_of_stay_for_the_grace(store: Store) -> None:
    """For whoever reads them."""
    made_from(store, "shard", "f1", age=9000)
    with new_attempt(store, "shard", "f1", afresh=True) as attempt:
        fill(attempt, {"x.bin": b"other"})
        attempt.commit(identity=identity(), metrics={}, replace=True)
    assert collected(store) == []
    os.utime(store.path("shard", "f1", "manifest.json"), (time.time() - 7200,) * 2)
    assert collected(store) == [("attempt", "shard/f1")]


def test_a_stage_on_another_disk_is_collected_as_any_other(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path(store.root).mkdir()
    Path(store.path("train")).symlink_to(elsewhere)
    shard = made_from(store, "shard", "f1", age=9000)
    made_from(store, "train", "f2", age=9000)
    with hold_lease(store, "train", "t", inputs={"shard": shard.fingerprint}):
        assert collected(store, keep_last=0) == [("artifact", "train/f2")]
    os.utime(store.path("train", "f2", "retired.json"), (time.time() - 7200,) * 2)
    assert collected(store) == [("attempt", "train/f2")]


def test_what_was_copied_here_within_the_grace_is_young_whatever_its_age(store: Store, tmp_path: Path) -> None:
    made_from(store, "train", "old", age=9000)
    target = Store(str(tmp_path / "target"))
    copied(store, target)
    assert collected(target, keep_last=0) == []
    assert collected(target, keep_last=0, grace=EVERYTHING) == [("artifact", "train/old"), ("attempt", "train/old")]


def test_a_dry_run_needs_no_right_to_write(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made_from(store, "train", "old", age=9000)

    def refused(*_: Any, **__: Any) -> bool:
        raise NanodlmError("refuses access")

    monkeypatch.setattr(Store, "write_json", refused)
    assert collected(store, keep_last=0, dry_run=True) == [("artifact", "train/old")]
    with pytest.raises(NanodlmError, match="refuses access"):
        collected(store, keep_last=0)


def test_the_lease_of_a_dead_run_protects_nothing_for_ever(store: Store) -> None:
    with new_attempt(store, "train", "t") as attempt:
        fill(attempt, {"half": b"written"})
    store.write_json(store.path("train", "t", "lease.json"), {"holder": "gone", "host": "elsewhere", "pid": 1})
    for path in Path(store.path("train", "t")).rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    assert collected(store) == [("attempt", "train/t")]


def test_an_unreadable_manifest_keeps_all_attempts_that_it_may_name(store: Store) -> None:
    made_from(store, "train", "f1", age=9000)
    Path(store.path("train", "f1", "manifest.json")).write_text("{")
    before = files(store)
    assert collected(store, keep_last=0, older_than=0, grace=EVERYTHING) == []
    assert files(store) == before


def test_no_result_is_given_up_while_a_manifest_cannot_be_read(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """What the torn one was made from is not known."""
    made_from(store, "train", "f1", age=9000)
    made_from(store, "shard", "f2", age=9000)
    Path(store.path("train", "f1", "manifest.json")).write_text("{")
    assert collected(store, keep_last=0, older_than=0, grace=EVERYTHING) == []
    assert "no result is given up" in caplog.text
    assert store.find("shard", "f2")


def test_a_collectors_clock_that_is_a_day_ahead_ends_nothing_under_way(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_lease(store, "shard", "f0"), new_attempt(store, "shard", "f0") as attempt:
        (attempt.path / "a.bin").write_bytes(b"a")
        ahead = time.time() + 86400
        monkeypatch.setattr(time, "time", lambda: ahead)
        assert list(collect.collect(store)) == []


def test_a_folder_that_cannot_be_listed_stops_a_collection(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made_from(store, "train", "f1", age=9000)
    scandir = os.scandir

    def scan(path: Any) -> Any:
        if str(path) == store.path("train"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(NanodlmError, match="refuses access"):
        collected(store, keep_last=0, grace=EVERYTHING)


def test_results_are_not_counted_below_0(store: Store) -> None:
    with pytest.raises(UsageError, match="--keep-last counts results"):
        list(collect.collect(store, keep_last=-1))


def test_a_collection_follows_no_link_out_of_the_store(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    attempts = Path(store.path("train", "f1", "attempts"))
    attempts.mkdir(parents=True)
    (attempts / "a").symlink_to(outside)
    (attempts / "b").mkdir()
    (attempts / "b" / "link.txt").symlink_to(outside / "mine.txt")
    (attempts / "b" / "folder").symlink_to(outside)
    collected(store, grace=EVERYTHING)
    assert (outside / "mine.txt").read_text() == "mine"


def test_unfinished_uploads_in_several_parts_are_ended(s3_environment: None, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    fs.mkdir("uploads-bucket")
    store = Store("s3://uploads-bucket/runs")
    others = ["runs-of-others/big.bin", "runs/backups/2026/disk.img"]
    for key in ("runs/train/f1/attempts/a/big.bin", *others):
        fs.call_s3("create_multipart_upload", Bucket="uploads-bucket", Key=key)

    def open_uploads() -> list[str]:
        listed = fs.call_s3("list_multipart_uploads", Bucket="uploads-bucket")
        return [upload["Key"] for upload in listed.get("Uploads", [])]

    assert list(collect.collect(store, grace=1e9)) == [], "it may be under way"  # moto says that all began in 2010
    with hold_lease(store, "train", "f1"):
        assert list(collect.collect(store, grace=3600)) == [], "a large file may be under way for long"
    (row,) = collect.collect(store, grace=EVERYTHING, dry_run=True)
    assert (row["kind"], row["uri"]) == ("upload", "s3://uploads-bucket/runs/train/f1/attempts/a/big.bin")
    assert len(open_uploads()) == 3
    assert len(list(collect.collect(store, grace=EVERYTHING))) == 1
    assert open_uploads() == others


def test_gc_says_what_goes_and_when(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made_from(store, "train", "old", age=9000)
    made_from(store, "train", "new", age=8000)
    command = ["gc", "--store", store.uri(), "--keep-last", "1"]
    out, _ = said(capsys, *command, "--dry-run")
    assert out.splitlines()[0] == f"would remove        3 B  artifact {store.uri('train', 'old')}"
    rows = told(capsys, *command, "--dry-run")
    assert rows == {
        "removed": [{"kind": "artifact", "uri": store.uri("train", "old"), "bytes": 3}],
        "dry_run": True,
    }
    out, _ = said(capsys, *command, "--older-than", "1h")
    assert out.startswith("removed        3 B  artifact")
    assert "the first collection after 1h" in out
    assert said(capsys, *command)[0] == "nothing to remove\n"
    _, error = said(capsys, "gc", "--store", store.uri(), "--older-than", "soon", code=2)
    assert "'soon' is no age: give a number and s, m, h or d" in error


# Explaining


def reasons(made: Made, **groups: dict[str, Any]) -> list[str]:
    return sorted(set(why.explain(made.artifacts["sample"], made.config.replace(**groups))))


def test_each_setting_that_differs_is_named_with_its_stage(made: Made) -> None:
    assert reasons(made, sample={"seed": 7}) == ["sample: seed: 0 -> 7"]
    found = reasons(made, sample={"seed": 7}, train={"lr": 0.5}, data={"val_tokens": 900})
    assert found == ["sample: seed: 0 -> 7", "split: val_tokens: 1000 -> 900", "train: train.lr: 0.008 -> 0.5"]


def test_an_input_that_has_gone_or_changed_is_named(made: Made) -> None:
    split = made.artifacts["split"]
    made.store.retire(("split", split.fingerprint))
    assert reasons(made) == ["shard: the split artifact that it was made from is not there any more"]
    with new_attempt(made.store, "split", split.fingerprint, afresh=True) as attempt:
        fill(attempt, {"validation.npy": b"other"})
        kept = {key: split.manifest[key] for key in ("schema", "stage", "version", "parameters", "inputs")}
        attempt.commit(identity=kept, metrics={})
    assert reasons(made) == ["shard: the split artifact was rebuilt with other bytes since"]


def test_another_source_is_named_by_its_files(made: Made) -> None:
    with Path(made.config.data.source[0]).open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    (reason,) = reasons(made)
    assert reason.startswith("download: files")


def test_explain_prints_a_line_for_each_difference(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    sample = made.artifacts["sample"].uri
    config = flags(made.config)
    out, _ = said(capsys, "explain", sample, *config)
    assert out == "it would be reused: nothing that it depends on differs\n"
    out, _ = said(capsys, "explain", sample, *config, "--train.lr", "0.5", "--sample.seed", "7")
    assert sorted(out.splitlines()) == ["sample: seed: 0 -> 7", "train: train.lr: 0.008 -> 0.5"]
    found = told(capsys, "explain", sample, *config, "--train.lr", "0.5")
    assert found == {"uri": sample, "reused": False, "why": ["train: train.lr: 0.008 -> 0.5"]}
    assert "name an artifact" in said(capsys, "explain", "--train.lr", "0.5", code=2)[1]


# Copying


def copied(source: Store, target: Store, artifacts: list[tuple[str, str]] | None = None) -> dict[str, bool]:
    """Whether each artifact had to be sent, by stage."""
    wanted = list(source) if artifacts is None else artifacts
    return {a.stage: sent for a, sent in copy.copy(source, target, wanted, lambda *_, **__: None)}


class Cut(Exception):
    """Stands for a kill."""


def test_a_store_copied_there_and_back_is_the_same(master: Made, remote: Store, tmp_path: Path) -> None:
    artifacts = verify.chain(master.store, "sample", master.artifacts["sample"].fingerprint)
    names = [stage for stage, _ in artifacts]
    assert copied(master.store, remote, artifacts) == dict.fromkeys(names, True)
    back = Store(str(tmp_path / "back"))
    copied(remote, back)
    for name in names:
        again = back.open(f"{name}/{master.artifacts[name].fingerprint}")
        assert again.manifest == master.artifacts[name].manifest
        assert again.problems(deep=True) == []
    assert copied(master.store, back, artifacts) == dict.fromkeys(names, False)
    assert statuses(master.config, back, names) == dict.fromkeys(names, "cached")


def test_a_copy_that_was_cut_off_goes_on_without_sending_again_what_is_there(
    master: Made, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = master.artifacts["shard"]
    sent: list[str] = []
    put = Storage.put

    def counting(self: Storage, pairs: Any, done: Any = lambda _: None, *, until: int = 1000) -> None:
        for local, target in pairs:
            if len(sent) >= until:
                raise Cut
            put(self, [(local, target)], done)
            sent.append(target)

    monkeypatch.setattr(Storage, "put", lambda *args: counting(*args, until=2))
    with pytest.raises(Cut):
        copied(master.store, store, [("shard", shard.fingerprint)])
    assert store.find("shard", shard.fingerprint) is None, "it counts when it is whole"
    monkeypatch.setattr(Storage, "put", counting)
    assert copied(master.store, store, [("shard", shard.fingerprint)]) == {"shard": True}
    assert len(sent) == len(set(sent)) == len(shard.manifest["files"])


def test_a_copy_is_repaired_and_gone_on_from_like_its_original(made: Made, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "target"))
    assert all(copied(made.store, store).values())
    shard, train = (store.open(made.artifacts[stage].uri) for stage in ("shard", "train"))
    good = {path: path.stat().st_ino for path in Path(shard.remote("parts")).parent.glob("train-*")}
    flip(bad := sorted(good)[0])
    (found,) = verify.check(store, [("shard", shard.fingerprint)], deep=True, repair=True)
    assert found.repaired
    again = store.open(shard.uri)
    assert again.digest == shard.digest
    kept = {path.name: inode for path, inode in good.items() if path != bad}
    assert {name: Path(again.remote(name)).stat().st_ino for name in kept} == kept
    assert find_checkpoint(f"{train.uri}/checkpoints/step_6").local(Path("unused")).is_dir()


def test_a_copy_that_was_killed_within_a_file_goes_on(tmp_path: Path) -> None:
    source, target = Store(str(tmp_path / "source")), Store(str(tmp_path / "target"))
    artifact = committed(source, {"x": b"one"})
    begun = Path(target.path("shard", "f0", "attempts", artifact.manifest["attempt"], "x"))
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"o")
    assert copied(source, target) == {"shard": True}
    assert target.open("shard/f0").check(deep=True)


def test_a_collection_beside_a_copy_leaves_what_has_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Store(str(tmp_path / "source")), Store(str(tmp_path / "target"))
    committed(source, {"x": b"one"})
    check = Artifact.check

    def collecting(self: Artifact, *only: str, deep: bool = False) -> Artifact:
        if deep and self.store is target:
            assert list(collect.collect(target, grace=EVERYTHING)) == []
        return check(self, *only, deep=deep)

    monkeypatch.setattr(Artifact, "check", collecting)
    assert copied(source, target) == {"shard": True}
    assert target.open("shard/f0").check(deep=True)


def test_a_copy_shows_how_far_it_is(master: Made, remote: Store, tmp_path: Path) -> None:
    shard, told = master.artifacts["shard"], []

    def emit(kind: str, **fields: Any) -> None:
        told.append((kind, fields["unit"], fields["done"], fields["total"]))

    for source, target in ((master.store, remote), (remote, Store(str(tmp_path / "back")))):
        list(copy.copy(source, target, [("shard", shard.fingerprint)], emit))
        kind, unit, done, total = told[-1]
        assert (kind, unit) == ("progress", "MB copied")
        assert done == pytest.approx(total) == pytest.approx(sum(f["size"] for f in shard.manifest["files"]) / 1e6)
    assert "MB of shard fetched" in {unit for _, unit, _, _ in told}


def test_a_damaged_source_is_not_copied(made: Made, store: Store, tmp_path: Path) -> None:
    shard = made.artifacts["shard"]
    flip(made.first("shard", "train-*"))
    target = Store(str(tmp_path / "target"))
    with pytest.raises(Damaged, match=r"train-00000\.arrayrecord has been altered"):
        copied(made.store, target, [("shard", shard.fingerprint)])
    assert left(target) == []


def test_another_artifact_in_the_target_is_not_replaced(tmp_path: Path) -> None:
    one, other = Store(str(tmp_path / "one")), Store(str(tmp_path / "other"))
    committed(one, {"x": b"one"})
    theirs = committed(other, {"x": b"other"})
    with pytest.raises(NanodlmError, match=r"holds another artifact than .*: remove one of them"):
        copied(one, other)
    assert other.open("shard/f0").manifest == theirs.manifest


def test_copy_of_one_artifact_takes_what_it_was_made_from_along(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "target")
    split = made.artifacts["split"].uri
    out, _ = said(capsys, "copy", split, target)
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["copied"] * 3
    assert out.splitlines()[-1].startswith("3 artifacts there; ")
    assert sorted(stage for stage, _ in Store(target)) == ["download", "split", "tokenizer"]
    rows = told(capsys, "copy", made.store.uri(), target)["artifacts"]
    assert [row["copied"] for row in rows] == [False] * 3 + [True] * 3
    assert rows[3]["uri"].startswith(f"{target}/shard/")
    assert "holds no artifacts" in said(capsys, "copy", str(tmp_path / "nothing"), target, code=1)[1]
    assert "nanodlm copy SRC DST" in said(capsys, "copy", code=2)[1]


# Adopting


@pytest.fixture
def at_hand(tmp_path: Path) -> list[str]:
    """Parquet files that somebody has fetched from the hub before."""
    texts = prose(300)
    for i in range(3):
        pq.write_table(pa.table({"text": texts[100 * i : 100 * (i + 1)]}), tmp_path / f"hub-{i}.parquet")
    return [str(tmp_path / f"hub-{i}.parquet") for i in range(3)]


HUB = {"source": "hf://owner/name", "revision": "0123456789" * 4}


def test_files_at_hand_stand_for_a_data_set_on_the_hub(store: Store, at_hand: list[str]) -> None:
    config = tiny_config(**HUB, part_mb=0.02)
    adopted, built = adopt.adopt(config, store, [f"{Path(at_hand[0]).parent}/hub-*.parquet"])
    assert built
    assert adopted.metrics["adopted"] is True
    assert adopted.metrics["documents"] == 300
    fetched, _ = run.run_stage("download", tiny_config(at_hand, part_mb=0.02), store)
    assert adopted.digest == fetched.digest, "as if the source had been these files"
    again, built = adopt.adopt(config, store, at_hand)
    assert (again.manifest, built) == (adopted.manifest, False)
    assert statuses(config, store, CHAIN[:4]) == {**dict.fromkeys(CHAIN[:4], "built"), "download": "cached"}


def test_documents_of_other_files_are_not_gone_on_from(store: Store, at_hand: list[str], tmp_path: Path) -> None:
    """Neither by another `adopt` nor by a run: the first was stopped by its last file."""
    config = tiny_config(at_hand, part_mb=0.001)
    for i in range(2):
        table = pa.table({"text" if i == 0 else "other": [f"wrong {n}" for n in range(100)]})
        pq.write_table(table, tmp_path / f"wrong-{i}.parquet")
    with pytest.raises(NanodlmError, match="has no column 'text'"):
        adopt.adopt(config, store, [f"{tmp_path}/wrong-*.parquet"])
    assert list(Path(store.root).glob("download/*/attempts/*/parts/*")), "it had finished parts"
    artifact, _ = run.run_stage("download", config, store)
    clean, _ = run.run_stage("download", config, Store(str(tmp_path / "clean")))
    assert artifact.digest == clean.digest


def test_documents_of_files_that_changed_while_they_were_read_are_not_kept(
    store: Store, at_hand: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = tiny_config(at_hand, part_mb=0.001), Path(at_hand[0])
    before, read = first.read_bytes(), download.read_documents

    def changing(*args: Any) -> Any:
        pq.write_table(pa.table({"text": ["other"] * 100}), first)
        yield from read(*args)

    monkeypatch.setattr(download, "read_documents", changing)
    with pytest.raises(NanodlmError, match="changed while they were read: run again"):
        run.run_stage("download", config, store)
    monkeypatch.setattr(download, "read_documents", read)
    first.write_bytes(before)
    artifact, _ = run.run_stage("download", config, store)
    clean, _ = run.run_stage("download", config, Store(str(tmp_path / "clean")))
    assert artifact.digest == clean.digest


def test_adopt_prints_what_it_took(store: Store, at_hand: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--store", store.uri(), "--data.source", HUB["source"], "--data.revision", HUB["revision"]]
    out, _ = said(capsys, "adopt", *at_hand, *config)
    ((stage, fingerprint),) = store
    assert out == f"adopted  {store.uri(stage, fingerprint)}\n"
    assert said(capsys, "adopt", *at_hand, *config)[0] == f"there already  {store.uri(stage, fingerprint)}\n"
    assert told(capsys, "adopt", *at_hand, *config) == {"uri": store.uri(stage, fingerprint), "adopted": False}
    assert "name the files" in said(capsys, "adopt", *config, code=2)[1]
    nothing = ["adopt", "missing-*.parquet", *config, "--data.column", "other"]
    assert "no file matches 'missing-*.parquet': check what is to be adopted" in said(capsys, *nothing, code=1)[1]


@pytest.mark.parametrize(("stage", "kept"), [("shard", 4), ("train", 2)])
def test_of_a_stage_that_is_not_done_each_part_is_kept_once_and_of_a_training_only_what_a_run_would_continue(
    stage: str, kept: int, store: Store
) -> None:
    for name in ("checkpoints/1", "checkpoints/2", "checkpoints/2", "checkpoints/3", "checkpoints/4"):
        with new_attempt(store, stage, "f0") as attempt:
            fill(attempt, {name: name.encode()})
            attempt.finish(name, [name])
    with new_attempt(store, stage, "f0") as attempt:
        fill(attempt, {"checkpoints/1": b"1", "checkpoints/2": b"2"})
        attempt.finish("checkpoints/1", ["checkpoints/1"])
        attempt.finish("checkpoints/2", ["checkpoints/2"])
    with new_attempt(store, stage, "f0") as attempt:
        fill(attempt, {"checkpoints/5": b"5"})
        attempt.finish("checkpoints/5", ["checkpoints/5"])
    list(collect.collect(store, grace=-1.0))
    assert len({path.split("/")[0] for path in store.files(store.path(stage, "f0", "attempts"))}) == kept
