"""The command line: its exit codes and the one line it says when something is wrong."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nanodlm.cli import main
from nanodlm.config import PRESETS
from nanodlm.errors import NanodlmError
from nanodlm.stages import run as stages_run
from nanodlm.stages import table
from nanodlm.stages.table import NAMES
from nanodlm.store import Store
from tests.support.commands import environment, nanodlm, result_of, speeches


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the data stages of the tiny configuration, built without Prefect."""
    from nanodlm.config import PRESETS
    from nanodlm.stages import run as stages_run
    from nanodlm.store import Store

    path = tmp_path_factory.mktemp("store")
    config = PRESETS["demo"].replace(
        data={"source": speeches(6), "val_tokens": 20000, "tokenizer": "bytes", "part_mb": 0.05},
        model={"seq_len": 32},
    )
    for name in table.until("shard"):
        stages_run.run_stage(name, config, Store(str(path)))
    return path


PREPARED = ["--data.source", *speeches(6), "--data.val_tokens", "20000", "--data.tokenizer", "bytes"]
PREPARED += ["--data.part_mb", "0.05", "--model.seq_len", "32"]


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, for starting one takes longer than most commands do."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def run(*args: str) -> "subprocess.CompletedProcess[str]":
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main([*args])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(args, ended.value.code, said.out, said.err)

    return run


def _fails(command: Command, code: int, *args: str, says: tuple[str, ...]) -> None:
    done = command(*args)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr, done.stderr


BAD: list[tuple[list[str], tuple[str, ...]]] = [
    (["frobnicate"], ("unknown command 'frobnicate'", "run")),
    (["run", "nope"], ("unknown preset 'nope'", "demo", "owt")),
    (["run", "--train.lr", "abc"], ("--train.lr", "abc")),
    (["run", "--train.lr", "-1"], ("lr", "greater than 0")),
    (["run", "--schedule.kind", "quadratic"], ("quadratic", "linear", "cosine", "sqrt")),
    (["run", "--until", "nowhere"], ("nowhere", "shard")),
    (["run", "--model.d_model", "100", "--model.n_heads", "8"], ("d_model (100)", "n_heads (8)", "try")),
    (["run", "--train.min_lr", "1"], ("min_lr (1.0) is larger than lr",)),
    (["run", "--train.lr", "inf"], ("lr", "finite")),
    (["run", "--until", "split", "--rebuild", "train"], ("--rebuild train comes after --until split",)),
    (["run", "owt", "--data.tokenizer", "bpe"], ("pretokenized", "gpt2")),
    (["run", "--data.source", "hf://a/b"], ("pinned commit", "--data.revision")),
    (["run", "--store", "nothing://x"], ("nothing",)),
    (["bench", "nothing"], ("cannot measure nothing", "train, sample, loader")),
    (["train", "missing/config.json"], ("missing/config.json", "No such file")),
]


@pytest.mark.parametrize(("args", "says"), BAD)
def test_bad_usage_is_one_line_and_exit_code_2(command: Command, args: list[str], says: tuple[str, ...]) -> None:
    _fails(command, 2, *args, says=says)


@pytest.mark.parametrize(
    ("args", "says"), [BAD[0], (["run", "--train.lrr", "3"], ("--train.lrr", "perhaps you meant --train.lr"))]
)
def test_a_process_of_its_own_says_and_ends_the_same(args: list[str], says: tuple[str, ...]) -> None:
    _fails(nanodlm, 2, *args, says=says)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--exp.resume"], (True, False)),
        pytest.param(["--exp.use_wandb", "--exp.resume"], (True, True), marks=pytest.mark.slow),
        (["--exp.use-wandb", "--exp.resume", "False"], (False, True)),
        pytest.param(["--exp.resume", "True", "--exp.use_wandb", "False"], (True, False), marks=pytest.mark.slow),
        (["--exp.resume=False"], (False, False)),
    ],
)
def test_a_switch_may_stand_alone(words: list[str], expected: tuple[bool, bool]) -> None:
    config, _ = main._parse("train", ["demo", *words, "--train.lr", "0.1"], {}, configured=True)
    assert config is not None
    assert (config.exp.resume, config.exp.use_wandb) == expected
    config, _ = main._parse("train", ["--train.lr", "0.1", *words], {}, configured=True)
    assert config is not None
    assert (config.exp.resume, config.exp.use_wandb) == expected


def test_help_and_version_exit_with_0() -> None:
    assert "nanodlm COMMAND" in nanodlm("--help").stdout
    assert nanodlm("--version").stdout.strip()
    assert "--train.lr" in nanodlm("run", "--help").stdout


def test_a_stage_alone_names_the_input_that_is_missing(command: Command, tmp_path: Path) -> None:
    _fails(
        command,
        1,
        "train",
        "--store",
        str(tmp_path),
        says=("train needs tokenizer and shard", "nanodlm run --until shard"),
    )


@pytest.mark.parametrize("by", ["stage", pytest.param("command", marks=pytest.mark.slow)])
def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, by: str) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    store = str(blocked / "store")
    if by == "command":
        _fails(nanodlm, 1, "run", "--store", store, "--until", "download", says=("cannot write", "--store"))
        return
    with pytest.raises(NanodlmError, match=r"^cannot write to .*--store[^\n]*$") as caught:
        stages_run.run_stage("download", PRESETS["demo"], Store(store))
    assert caught.value.exit_code == 1


def test_plan_says_field_by_field_why_a_stage_would_be_built(command: Command, prepared: Path) -> None:
    done = command("plan", "--store", str(prepared), *PREPARED, "--data.val_tokens", "30000", "--json")
    rows = {row["stage"]: row for row in result_of(done)["stages"]}
    assert list(rows) == list(NAMES)
    assert [rows[name]["action"] for name in ("download", "tokenizer", "split", "shard")] == [
        "reuse",
        "reuse",
        "build",
        "build",
    ]
    assert "val_tokens: 20000 -> 30000" in rows["split"]["why"]
    assert rows["shard"]["fingerprint"] is None


def test_plan_does_nothing(command: Command, tmp_path: Path) -> None:
    assert command("plan", "--store", str(tmp_path / "new")).returncode == 0
    assert not (tmp_path / "new").exists()


def test_ls_and_show_list_what_there_is(command: Command, prepared: Path) -> None:
    rows = result_of(command("ls", "--store", str(prepared), "--json"))["artifacts"]
    assert [row["stage"] for row in rows] == ["download", "tokenizer", "split", "shard"]
    shown = result_of(command("show", rows[3]["uri"], "--json"))
    assert shown["metrics"]["val_tokens"] == 20000
    assert set(shown["inputs"]) == {"download", "tokenizer", "split"}
    text = command("show", rows[3]["uri"]).stdout
    assert "train-00000.arrayrecord" in text
    assert "seq_len" in text


def test_verify_deep_finds_a_flipped_byte_and_repair_builds_that_part_again(command: Command, prepared: Path) -> None:
    assert command("verify", "--store", str(prepared), "--deep").returncode == 0
    shard = next(prepared.glob("shard/*/attempts/*/train-00001.arrayrecord"))
    original, other = shard.read_bytes(), shard.with_name("train-00000.arrayrecord")
    shard.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert command("verify", "--store", str(prepared)).returncode == 0, "sizes alone cannot tell"
    bad = command("verify", "--store", str(prepared), "--deep")
    assert bad.returncode == 1
    assert "train-00001.arrayrecord has been altered" in bad.stdout
    # Nothing is trained on it.
    _fails(command, 1, "train", "--store", str(prepared), *PREPARED, says=("train-00001.arrayrecord", "--repair"))
    uri = str(shard.parents[2])
    mended = result_of(command("verify", uri, "--deep", "--repair", "--json"))
    assert (mended["damaged"], mended["repaired"]) == (1, 1)
    assert command("verify", "--store", str(prepared), "--deep").returncode == 0
    folder = Store(str(prepared)).open(uri).local()
    assert (folder / shard.name).read_bytes() == original
    assert (folder / other.name).stat().st_ino == other.stat().st_ino, "the good part was kept"
    plan = result_of(command("plan", "--store", str(prepared), *PREPARED, "--json"))["stages"]
    assert next(row for row in plan if row["stage"] == "shard")["action"] == "reuse"


def test_gc_leaves_fresh_attempts_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "shard" / "f" / "attempts" / "x").mkdir(parents=True)
    (tmp_path / "shard" / "f" / "attempts" / "x" / "file").write_text("young")
    assert result_of(command("gc", "--store", str(tmp_path), "--json"))["removed"] == []


def test_doctor_checks_this_machine_and_the_store(command: Command, tmp_path: Path) -> None:
    checks = result_of(command("doctor", "--store", str(tmp_path / "s"), "--json"))
    assert checks["ok"]
    assert {c["name"] for c in checks["checks"]} == {"python", "packages", "devices", "store", "corpus", "gpt2"}
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = command("doctor", "--store", str(blocked / "s"))
    assert done.returncode == 1
    assert "checks failed: store" in done.stderr


def test_the_corpus_must_be_larger_than_the_validation_split(tmp_path: Path) -> None:
    config = PRESETS["demo"].replace(data={"source": speeches(1), "tokenizer": "bytes"})
    for name in ("download", "tokenizer"):
        stages_run.run_stage(name, config, Store(str(tmp_path)))
    with pytest.raises(NanodlmError, match=r"smaller than the validation split.*--data\.val_tokens"):
        stages_run.run_stage("split", config, Store(str(tmp_path)))


def test_a_command_without_arguments_means_the_demo(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANODLM_STORE", str(tmp_path))
    done = command("plan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["download", "build"]
