"""Going on from a checkpoint: to the same bits, and only with the settings that made it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

import nanodlm
from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.checkpoints.identity import check_run, describe_run
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.cli import main
from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.stages import lookup
from nanodlm.store import Artifact, Store
from tests.support.checkpoints import EVERY, cut, words_for
from tests.support.training import tiny


def refusal(store: Store, start: str, *allowed: str, **groups: dict[str, Any]) -> str:
    exp = {"resume_path": start, "allow_changed": list(allowed)}
    with pytest.raises(UsageError) as caught:
        nanodlm.train(tiny(**groups, exp=exp), store.uri())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_interrupted_run_continues_from_its_last_checkpoint_to_the_same_bits(trained: Artifact, data: Path) -> None:
    store, config = Store(str(data)), tiny()
    cut(config, store, after=12)
    assert store.find("train", lookup.ready("train", config, store).fingerprint) is None
    resumed = nanodlm.train(config, store.uri())
    assert resumed.metrics["resumed_from_update"] == 10
    assert resumed.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]
    logs = json.loads((resumed.local() / "logs.json").read_text())
    assert [record["step"] for record in logs] == [3, 6, 9, 12]
    assert resumed.digest == trained.digest


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(trained: Artifact, data: Path) -> None:
    store, config = Store(str(data)), tiny(exp=EVERY)
    run = nanodlm.train(config, store.uri())
    for file in (run.local() / "checkpoints" / "step_000012").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    store.retire(("train", run.fingerprint))
    again = nanodlm.train(config, store.uri())
    assert again.metrics["resumed_from_update"] == 8
    assert again.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]


@pytest.fixture
def copied(trained: Artifact, data: Path) -> Artifact:
    """The finished run, with all its checkpoints, in a store of its own."""
    shutil.copytree(Path(trained.store.root, "train", trained.fingerprint), data / "train" / trained.fingerprint)
    return Store(str(data)).open(trained.uri)


def test_what_lies_beside_the_last_checkpoint_is_restored_to_the_same_bytes_without_an_update(copied: Artifact) -> None:
    folder = Path(copied.folder)
    for name in ("logs.json", "logs.jsonl", "config.json", "parameters.json"):
        (folder / name).write_text("[")
    copied.store.retire(("train", copied.fingerprint))
    again = nanodlm.train(tiny(exp=EVERY), copied.store.uri())
    assert again.metrics == {**copied.metrics, "resumed_from_update": 12}
    assert again.files() == copied.files(), "all kept checkpoints among them"
    assert not again.problems(deep=True)


def test_resume_false_starts_an_interrupted_run_anew(trained: Artifact, data: Path) -> None:
    store = Store(str(data))
    cut(tiny(), store, after=9)
    run = nanodlm.train(tiny(exp={"resume": False}), store.uri())
    assert run.metrics["resumed_from_update"] == 0
    assert run.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]


def test_a_checkpoint_remembers_its_run(trained: Artifact, fourth: str) -> None:
    info = find_checkpoint(fourth).info
    assert info["config"]["train"]["batch_size"] == 4
    assert info["corpus"]["val_tokens"] == 5000
    assert info["dataset"] == trained.manifest["inputs"]["shard"]["digest"]
    assert info["tokenizer"] == trained.manifest["inputs"]["tokenizer"]["digest"]
    assert info["key"]["data"] == jax.random.key_data(jax.random.key(123)).tolist()
    assert info["rows_seen"] == 16
    assert [record["step"] for record in info["logs"]] == [3]


def test_a_run_started_from_a_checkpoint_ends_with_the_bits_of_the_run_that_made_it(
    trained: Artifact, store: Store, fourth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = nanodlm.train(tiny(exp={"resume_path": fourth}), store.uri())
    assert run.metrics["resumed_from_update"] == 4
    assert run.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]
    assert run.fingerprint != trained.fingerprint
    assert run.digest == trained.digest
    assert sorted(path.name for path in (run.local() / "checkpoints").iterdir()) == ["step_000010", "step_000012"]
    # Whatever the address, it is the same checkpoint, and so the same artifact.
    folder = trained.local()
    monkeypatch.chdir(folder)
    for address in (f"{folder}/checkpoints/step_000004/", "checkpoints/step_4", f"{trained.uri}/checkpoints/step_0004"):
        assert nanodlm.train(tiny(exp={"resume_path": address}), store.uri()).manifest == run.manifest


@pytest.mark.slow
def test_an_interrupted_run_that_was_started_from_a_checkpoint_continues_from_its_own(
    trained: Artifact, store: Store, fourth: str
) -> None:
    config = tiny(train={"max_steps": 11}, exp={"resume_path": fourth, "allow_changed": ["train.max_steps"]})
    cut(config, store, after=11)
    run = nanodlm.train(config, store.uri())
    assert run.metrics["resumed_from_update"] == 10


def test_a_checkpoint_of_another_run_is_refused_field_by_field(store: Store, fourth: str) -> None:
    changed = {"train": {"lr": 1e-3, "max_steps": 20}, "data": {"shuffle_seed": 1}, "objective": {"weighting": "bound"}}
    said = refusal(store, fourth, **changed)
    assert "data.shuffle_seed: 123 -> 1; objective.weighting: uniform -> bound; train.lr: 0.008 -> 0.001; " in said
    assert "train.max_steps: 12 -> 20)" in said
    assert said.endswith("add --exp.allow_changed data.shuffle_seed objective.weighting train.lr train.max_steps")
    # Allowing some is not enough, and what to say is said in full.
    said = refusal(store, fourth, "train.max_steps", train={"lr": 1e-3, "max_steps": 20})
    assert said.endswith("add --exp.allow_changed train.lr train.max_steps")


def test_other_data_are_refused_with_the_settings_that_made_them(store: Store, fourth: str) -> None:
    said = refusal(store, fourth, data={"val_tokens": 6000})
    assert re.search(r"\(dataset: \w{12}… -> \w{12}… \(data\.val_tokens: 5000 -> 6000\)\)", said), said
    assert said.endswith("add --exp.allow_changed dataset")


def test_another_network_is_refused_whatever_is_allowed(store: Store, fourth: str) -> None:
    said = refusal(store, fourth, "train.lr", model={"d_ff": 64}, train={"lr": 1e-3})
    assert "model.d_ff: 32 -> 64; train.lr: 0.008 -> 0.001" in said
    assert "model.d_ff cannot change in mid-training" in said
    said = refusal(store, fourth, "train.clip_grad_norm", train={"clip_grad_norm": 0.0})
    assert "do not fit this configuration" in said


def test_what_is_allowed_by_name_may_change_and_no_row_is_skipped_or_seen_twice(store: Store, fourth: str) -> None:
    names = ["train.batch_size", "train.ema_decay", "train.max_steps", "train.skip_nonfinite"]
    changes = {"batch_size": 2, "ema_decay": 0.5, "max_steps": 8, "skip_nonfinite": True}
    run = nanodlm.train(tiny(train=changes, exp={"resume_path": fourth, "allow_changed": names}), store.uri())
    assert run.metrics["resumed_from_update"] == 4
    assert run.metrics["trained_tokens"] == (4 * 4 + 4 * 2) * 32
    assert run.metrics["skipped"] == 0
    assert find_checkpoint(f"{run.uri}/step_8").info["rows_seen"] == 24
    model, _ = nanodlm.load(run.uri)
    assert parameters_sha256(nnx.to_pure_dict(nnx.state(model))) == run.metrics["parameters_sha256"]


def test_other_randomness_is_refused_and_so_is_a_checkpoint_that_does_not_know_its_run() -> None:
    one, other = (describe_run(tiny(), "data", "tokens", jax.random.key(0, impl=i)) for i in ("threefry2x32", "rbg"))
    with pytest.raises(UsageError, match=r"\(key: threefry2x32 -> rbg\): .* --exp\.allow_changed key$"):
        check_run(one, other, ("train.lr",), "it")
    check_run(one, other, ("key",), "it")
    with pytest.raises(UsageError, match="it does not say what it was trained with"):
        check_run({"logs": []}, one, (), "it")


def test_a_checkpoint_that_has_all_updates_is_refused(store: Store, fourth: str) -> None:
    assert "raise --train.max_steps" in refusal(store, fourth, "train.max_steps", train={"max_steps": 4})


def test_a_name_that_cannot_be_allowed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names 'train\.speed', which is no setting"):
        tiny(exp={"allow_changed": ["train.speed"]})
    with pytest.raises(ValueError, match="is False beside"):
        tiny(exp={"resume": False, "resume_path": "x/step_1"})


def test_a_damaged_or_unfinished_checkpoint_is_refused(trained: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.local(), folder)
    address = f"{folder}/checkpoints/step_8"
    assert find_checkpoint(address).local().is_dir()
    file = max((folder / "checkpoints" / "step_000008").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(Damaged, match=rf"step_000008 is damaged: .*{file.name} has been altered.*; start from another"):
        nanodlm.train(tiny(exp={"resume_path": address}), trained.store.uri())
    (folder / "parts" / "checkpoints" / "step_000012.json").unlink()
    for name, words in (
        ("step_12", r"no finished checkpoint step_000012 in .*/run: there are step_000004, step_000008"),
        ("checkpoints", "must end in step_ and a number"),
        ("nowhere/step_8", "there are none"),
    ):
        with pytest.raises(UsageError, match=words):
            find_checkpoint(f"{folder}/{name}")


@pytest.mark.parametrize(("group", "field", "value"), [("model", "n_heads", 1), ("objective", "kind", "uniform")])
def test_a_folder_whose_settings_were_edited_is_not_loaded(
    trained: Artifact, tmp_path: Path, group: str, field: str, value: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.local(), folder)
    settings = json.loads((folder / "config.json").read_text())
    before, settings[group][field] = settings[group][field], value
    assert nanodlm.load(f"{folder}/checkpoints/step_12")
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(NanodlmError, match=rf"not what .* was trained with \({group}.{field}: {before} -> {value}"):
        nanodlm.load(f"{folder}/checkpoints/step_12")


def test_the_original_flags_start_from_a_checkpoint(
    trained: Artifact, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ("--exp.resume", "--exp.resume_path", f"{trained.local()}/checkpoints/step_4")
    command = ["train", *words_for(tiny(), data), *resume, "--json", "--train.lr", "0.001"]
    with pytest.raises(SystemExit, match="2"):
        main.main(command)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "(train.lr: 0.008 -> 0.001): if that is meant, add --exp.allow_changed train.lr" in said
    with pytest.raises(SystemExit, match="0"):
        main.main([*command, "--exp.allow_changed", "train.lr"])
    changed = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert changed["resumed_from_update"] == 4
    assert changed["parameters_sha256"] != trained.metrics["parameters_sha256"]
