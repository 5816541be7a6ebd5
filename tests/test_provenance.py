"""Manifests record the code that made an artifact, and what has changed since is told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nanodlm
from nanodlm.provenance import changed_since, code_record, sources
from nanodlm.stages.table import STAGES
from nanodlm.store import Store, new_attempt
from tests.support.commands import environment


def test_a_stage_depends_on_its_own_code_and_all_that_it_imports_but_settings_and_storage() -> None:
    train = sources(STAGES["train"].module)
    assert {"training/loop.py", "training/step.py", "model/layers.py", "diffusion/objective.py"} <= train.keys()
    assert not [name for name in train if name.startswith(("config/", "store/", "stages/", "cli/", "generation/"))]
    download = sources(STAGES["download"].module)
    assert {"data/download.py", "data/sources.py"} <= download.keys()
    assert not [name for name in download if name.startswith(("model/", "diffusion/"))]
    assert all((Path(nanodlm.__file__).parent / name).is_file() for name in train)


def test_a_manifest_says_which_code_made_it_and_what_has_changed_is_named(tmp_path: Path) -> None:
    store, code = Store(str(tmp_path)), code_record("nanodlm.evaluation.report")
    assert set(code) >= {"digest", "module", "files"}
    assert set(code) <= {"digest", "module", "files", "commit", "modified"}
    made, edited = {}, {"evaluation/report.py": "0", "gone.py": "1"}
    for name, record in (("now", code), ("then", {**code, "files": {**code["files"], **edited}})):
        with new_attempt(store, "report", name) as attempt:
            (attempt.path / "x").write_text("x")
            identity = {"schema": 1, "stage": "report", "version": 1, "parameters": {}, "inputs": {}}
            made[name] = attempt.commit(identity=identity, metrics={}, code=record)
    assert changed_since(made["now"]) == []
    assert changed_since(made["then"]) == ["evaluation/report.py", "gone.py"]
    made["then"].manifest["code"]["module"] = "nanodlm.evaluation.gone"
    assert "evaluation/report.py" in changed_since(made["then"]), "its module was removed"
    del made["then"].manifest["code"]  # as older versions wrote it
    assert changed_since(made["then"]) == []


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the source beside a text, to be edited."""
    root = Path(nanodlm.__file__).parents[1]
    for package in ("nanodlm", "flows"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "text.txt").write_text("\n\n".join(f"A paragraph with the number {i}." for i in range(40)))
    return tmp_path


@pytest.mark.slow
def test_results_of_edited_code_are_told_and_built_again_when_asked(
    clone: Path, prefect_server: dict[str, str]
) -> None:
    environ = {**environment(**prefect_server), "PYTHONPATH": str(clone)}

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "nanodlm", *words],
            cwd=clone,
            env=environ,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout

    flags = ("--data.source", "text.txt", "--data.sample_by", "paragraph", "--data.tokenizer", "bytes")
    flags += ("--data.val_tokens", "100", "--model.seq_len", "16", "--until", "shard", "--store", "store")
    command("run", *flags)
    with (clone / "nanodlm" / "data" / "shard.py").open("a") as file:
        file.write("# edited\n")
    planned = json.loads(command("plan", "--json", *flags).splitlines()[-1])["stages"]
    changed = ["data/shard.py"]
    assert [stage["changed"] for stage in planned] == [[], [], [], changed]
    assert {stage["action"] for stage in planned} == {"reuse"}, "an upgrade builds nothing again by itself"
    for words in (("plan", *flags), ("run", *flags), ("ls", "--store", "store")):
        assert "made before data/shard.py changed" in command(*words)
    again = json.loads(command("run", "--rebuild", "changed", "--json", *flags).splitlines()[-1])["stages"]
    assert [stage["status"] for stage in again] == ["cached", "cached", "cached", "built"]
    assert "changed" not in command("plan", *flags), "equal bytes, and the code of today"
