"""Damage is found, named and mended, and what a store holds is shown."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nanodlm.errors import Damaged
from nanodlm.generation import generate
from nanodlm.stages import run
from nanodlm.store import Store, new_attempt, sealed
from nanodlm.upkeep import verify
from tests.support.helpers import committed, flip, identity
from tests.support.upkeep import CHAIN, Made, files, made_from, said, statuses, told


def test_the_chain_of_a_sample_goes_down_to_the_data_in_the_order_of_the_stages(master: Made) -> None:
    sample = master.artifacts["sample"]
    chain = verify.chain(master.store, ("sample", sample.fingerprint))
    assert list(chain) == [(name, master.artifacts[name].fingerprint) for name in CHAIN]
    assert [found.problems for found in master.check(deep=True).values()] == [[]] * len(CHAIN)


def test_a_deep_check_shows_how_far_it_is(master: Made) -> None:
    told: list[dict[str, Any]] = []
    shard = master.artifacts["shard"]
    shard.problems(deep=True, emit=lambda kind, **fields: told.append({"kind": kind, **fields}))
    assert len(told) == len(shard.manifest["files"])
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
    for path in made.first("train", "checkpoints/step_000012").rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip(path)
    found = made.check(deep=True, repair=True, of="train")
    assert found["train"].repaired
    train = made.store.open(made.artifacts["train"].uri)
    assert train.metrics == made.artifacts["train"].metrics, "what was measured then is what is told"
    assert train.digest == digest
    assert statuses(made.config, made.store)["sample"] == "cached"


CHECKPOINT, SHARD = ("train", "checkpoints/step_000012"), ("shard", "train-00000.arrayrecord")


@pytest.mark.parametrize(("stage", "name"), [CHECKPOINT, SHARD])
@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_a_damaged_record_of_a_part_or_a_checkpoint_is_named_and_made_again(
    stage: str, name: str, damage: str, made: Made
) -> None:
    """A repair and a training go on from what it names."""
    artifact = made.artifacts[stage]
    record = Path(artifact.folder, "parts", f"{name}.json")
    flip(record) if damage == "altered" else record.unlink()
    found = made.check(deep=True, repair=True)
    ((bad, problems),) = {stage: checked.problems for stage, checked in found.items() if checked.problems}.items()
    assert (bad, len(problems)) == (stage, 1)
    assert re.match(rf"parts/{name}\.json (is missing|has been altered)", problems[0])
    assert found[stage].repaired
    again = made.store.open(artifact.uri)
    assert (again.digest, made.store.part(again.folder, name) is not None) == (artifact.digest, True)
    assert not any(checked.problems for checked in made.check(deep=True).values())
    assert made.store.open(made.artifacts["sample"].uri).manifest == made.artifacts["sample"].manifest


def test_an_artifact_of_an_earlier_version_whose_manifest_names_no_records_is_repaired_from_them(made: Made) -> None:
    shard = made.artifacts["shard"]
    listed = [file for file in shard.files() if not file["path"].startswith("parts/")]
    made.manifest("shard").write_text(
        json.dumps(sealed({**shard.manifest, "files": listed, "volatile": ["counts.npy"]}))
    )
    flip(Path(shard.remote(SHARD[1])))
    assert made.check(deep=True, repair=True)["shard"].repaired
    assert made.store.open(shard.uri).digest == shard.digest
    assert not any(checked.problems or checked.strays for checked in made.check(deep=True).values())


def test_a_torn_manifest_whose_settings_nobody_knows_stays_and_what_to_do_is_said(made: Made) -> None:
    path = made.manifest("sample")
    path.write_bytes(path.read_bytes()[:100])
    before = files(made.store)
    found = made.check()
    assert list(found) == ["sample"], "what it was made from cannot be known"
    assert "holds no record" in found["sample"].problems[0]
    found = made.check(repair=True)
    assert not found["sample"].repaired
    assert "not repaired: the settings that it was made with are not known: `nanodlm run --rebuild sample`" in str(
        found
    )
    assert files(made.store) == before
    run.run_stage("sample", made.config, made.store, rebuild=True)
    assert statuses(made.config, made.store) == dict.fromkeys(CHAIN, "cached")


@pytest.mark.parametrize("torn", [b'{"schema": 1', None], ids=["torn", "gone"])
def test_a_manifest_that_is_torn_or_gone_is_made_again_with_the_settings_of_what_was_made_from_it(
    made: Made, torn: bytes | None
) -> None:
    split, path = made.artifacts["split"], made.manifest("split")
    path.write_bytes(torn) if torn else path.unlink()
    found = made.check(repair=True)
    assert [stage for stage, checked in found.items() if checked.repaired] == ["split"]
    assert made.store.open(split.uri).digest == split.digest


def test_what_cannot_be_repaired_keeps_its_manifest_and_so_does_what_is_made_from_it(made: Made) -> None:
    Path(made.config.data.source[0]).unlink()
    flip(made.first("download", "part-*"))
    flip(made.first("shard", "train-*"))
    before = files(made.store)
    found = made.check(deep=True, repair=True)
    assert not any(checked.repaired for checked in found.values())
    assert "not repaired: no file matches" in found["download"].problems[1]
    assert "not repaired: the download artifact is damaged" in found["shard"].problems[1]
    assert before.items() <= files(made.store).items()


def test_without_the_source_a_shard_is_repaired_from_the_download(made: Made) -> None:
    Path(made.config.data.source[0]).unlink()
    flip(made.first("shard", "train-*"))
    assert made.check(deep=True, repair=True)["shard"].repaired
    assert not any(checked.problems for checked in made.check(deep=True).values())


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
    (_, found) = verify.check(store, sorted(store), repair=True)
    assert (found.stage, found.repaired) == ("shard.bak", False)
    assert "it is not damaged but out of place: move its folder to shard/f0, or remove it" in found.problems[1]
    assert Path(store.path("shard.bak", "f0", "manifest.json")).exists()


def test_of_two_repairs_the_second_keeps_what_the_first_has_made(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made.manifest("split")
    good = path.read_bytes()
    path.write_bytes(b"{")
    lease = run.hold_lease

    def waited(store: Store, *args: Any, **kwargs: Any) -> Any:
        path.write_bytes(good)  # the first commits while the second waits for its lease
        return lease(store, *args, **kwargs)

    monkeypatch.setattr(run, "hold_lease", waited)
    assert made.check(repair=True)["split"].repaired
    assert path.read_bytes() == good


def test_no_repair_trains_from_the_beginning_and_what_cannot_be_mended_stops_no_other(made: Made) -> None:
    for record in Path(made.artifacts["train"].folder, "parts", "checkpoints").iterdir():
        flip(record)
    before = files(made.store)
    with pytest.raises(Damaged, match=r"--deep --repair` builds what is bad again, if a checkpoint is whole$"):
        made.artifacts["train"].check(deep=True)
    obstacle = made.check(deep=True, repair=True, of="train")["train"].problems[-1]
    assert re.match("not repaired: no checkpoint of it is whole.*--rebuild train.*from the beginning", obstacle)
    assert files(made.store) == before
    manifest = made.manifest("train")
    manifest.write_bytes(manifest.read_bytes()[:100])
    made.manifest("split").unlink()
    made.manifest("split").mkdir()  # which nothing can be renamed to
    flip(made.first("shard", "train-*"))
    everything = verify.check(made.store, verify.chain(made.store, *made.store), deep=True, repair=True)
    found = {checked.stage: checked for checked in everything}
    assert all("not repaired" in str(found[stage].problems) for stage in ("train", "split"))
    assert found["sample"].problems == []


def test_a_repair_that_would_give_other_bytes_changes_nothing_and_names_the_rebuild(made: Made) -> None:
    """As on another number of devices, or with other versions of libraries."""
    sample = made.artifacts["sample"]
    flip(made.first("sample", "samples.txt"))
    with mock.patch.object(
        generate, "generate", lambda *_: {"other": Path(_[2].path, "samples.txt").write_text("other")}
    ):
        before = files(made.store)
        found = made.check(deep=True, repair=True)
    assert not found["sample"].repaired
    assert "not repaired: built again here it has other bytes, so nothing was changed: `nanodlm run --rebuild" in str(
        found
    )
    assert {path: content for path, content in files(made.store).items() if "lease" not in path} == before
    assert made.store.open(sample.uri).manifest == sample.manifest


def test_verify_of_a_store_names_what_its_artifacts_were_made_from_and_is_gone(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.manifest("split").unlink()
    out, _ = said(capsys, "verify", "--store", made.store.uri(), code=1)
    assert f"DAMAGED  {made.artifacts['split'].name}\n         its manifest is missing" in out
    out, _ = said(capsys, "verify", "--store", made.store.uri(), "--repair")
    assert f"REPAIRED {made.artifacts['split'].name}" in out


def test_verify_says_what_is_wrong_and_what_was_mended(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    sample, shard = made.artifacts["sample"].uri, made.artifacts["shard"].uri
    out, _ = said(capsys, "verify", sample)
    assert out.splitlines()[-1] == "6 artifacts: every file has its size"
    flip(made.first("shard", "train-*"))
    out, error = said(capsys, "verify", sample, "--deep", code=1)
    assert f"\nDAMAGED  {made.artifacts['shard'].name}\n         train-00000.arrayrecord has been altered" in out
    assert error == "nanodlm: 1 of 6 artifacts are damaged: add --repair to build again what is bad\n"
    rows = told(capsys, "verify", sample, "--deep", code=1)["artifacts"]
    assert [row["uri"] for row in rows if row["problems"]] == [shard]
    made.manifest("download").write_bytes(b"torn")
    out, _ = said(capsys, "verify", "--store", made.store.uri(), "--deep", "--repair")
    assert f"REPAIRED {made.artifacts['shard'].name}" in out
    assert f"REPAIRED {made.artifacts['download'].name}" in out
    assert "--repair" not in out, "it is done"
    assert out.endswith("6 artifacts, 2 repaired: every file has its sha256\n")
    assert said(capsys, "verify", sample, "--deep")[0].endswith("6 artifacts: every file has its sha256\n")
    good = {"problems": [], "repaired": False, "strays": []}
    rows = [{"uri": made.artifacts[name].uri, **good} for name in CHAIN]
    assert told(capsys, "verify", sample) == {"artifacts": rows, "damaged": 0, "repaired": 0}


def test_verify_of_nothing_is_one_clear_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _, error = said(capsys, "verify", store.uri("train", "f0"), code=1)
    assert f"no artifact at {store.uri('train', 'f0')}" in error
    assert "no artifacts in" in said(capsys, "verify", "--store", store.uri())[0]


def test_ls_shows_age_size_and_what_each_was_made_from(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = told(capsys, "ls", "--store", made.store.uri())["artifacts"]
    assert [row["stage"] for row in rows] == CHAIN
    train = made.artifacts["train"]
    assert rows[4]["inputs"] == {n: made.artifacts[n].fingerprint for n in ("shard", "tokenizer")}
    assert rows[4]["bytes"] == sum(file["size"] for file in train.manifest["files"])
    assert 0 <= rows[4]["age_seconds"] < 3600
    out, _ = said(capsys, "ls", "--store", made.store.uri())
    line = next(line for line in out.splitlines() if line.startswith(train.name))
    assert line.split()[3] in ("B", "kB", "MB")
    assert "tokens/s" in line
    assert f"from {made.artifacts['shard'].name} {train.name}\n" in out, "as commands take them"
    assert out.splitlines()[-1].startswith("6 artifacts, ")
    assert max(map(len, out.splitlines()[:-1])) < 120
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():  # as a terminal has it
        monkeypatch.setenv(name, value)
    narrow, _ = said(capsys, "ls", "--store", made.store.uri())
    assert max(map(len, narrow.splitlines()[:-1])) <= 80 < max(map(len, out.splitlines()[:-1]))
    assert narrow.split() == out.split()


def test_ls_shows_the_names_and_bounds_of_runs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with new_attempt(store, "evaluate", "e" * 64) as attempt:
        bound = {"val_bits_per_byte": 2.5, "val_bits_per_byte_stderr": 0.01}
        attempt.commit(identity=identity("evaluate"), metrics=bound, config={"exp": {"run_name": "night"}})
    out, _ = said(capsys, "ls", "--store", store.uri())
    assert out.splitlines()[0].endswith("night  2.5000 ± 0.0100 bits per byte")
    (row,) = told(capsys, "ls", "--store", store.uri())["artifacts"]
    assert (row["name"], row["val_bits_per_byte"]) == ("night", 2.5)


def test_ls_says_nothing_of_what_an_earlier_version_did_not_measure(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_attempt(store, "train", "t" * 64) as attempt:
        attempt.commit(identity=identity("train"), metrics={"updates": 3})
    assert said(capsys, "ls", "--store", store.uri())[0].splitlines()[0].endswith(" B")


def test_what_ls_and_plan_print_of_a_fingerprint_is_taken_by_every_command(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    where, train = ("--store", made.store.uri()), made.artifacts["train"]
    for name in (train.name, train.fingerprint[:12], f"{made.store.uri()}/{train.name}", f"train/{train.fingerprint}"):
        assert told(capsys, "show", name, *where)["digest"] == train.digest
        assert len(told(capsys, "verify", name, *where)["artifacts"]) == 5
    assert "no artifact at 0000" in said(capsys, "verify", "0000", *where, code=1)[1]


def test_show_says_where_each_input_lies_and_which_has_gone_or_is_damaged(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, shard, split = (made.artifacts[stage] for stage in ("sample", "shard", "split"))
    out, _ = said(capsys, "show", sample.uri)
    assert [line.split()[0] for line in out.partition("lineage\n")[2].splitlines()[:5]] == CHAIN[:5]
    assert all(artifact.uri in out for artifact in made.artifacts.values())
    assert " ago\n" in out
    assert told(capsys, "show", sample.uri)["digest"] == sample.digest
    made.store.retire(("split", split.fingerprint))
    made.manifest("tokenizer").write_text("{")
    out, _ = said(capsys, "show", shard.uri)
    assert f"{split.uri}  (not there any more)\n" in out
    assert f"{made.artifacts['tokenizer'].uri}  (damaged)\n" in out
    assert "\nfiles in " in out
