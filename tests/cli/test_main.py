"""The command line: its exit codes, and the one line it says when something is wrong."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanodlm.cli import arguments, run
from nanodlm.cli.main import COMMANDS, main
from nanodlm.config import PRESETS, Config
from nanodlm.errors import NanodlmError
from nanodlm.precision import measured
from nanodlm.stages import table
from nanodlm.stages.run import run_stage
from nanodlm.store import Artifact, Store
from tests.support.commands import environment, full, nanodlm, result_of, speeches
from tests.support.training import tiny

CONFIG = PRESETS["demo"].replace(
    data={"source": speeches(6), "val_tokens": 20000, "tokenizer": "bytes", "part_mb": 0.05}, model={"seq_len": 32}
)
PREPARED = ["--data.source", *speeches(6), "--data.val_tokens", "20000", "--data.tokenizer", "bytes"]
PREPARED += ["--data.part_mb", "0.05", "--model.seq_len", "32"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the data stages of the tiny configuration, built without Prefect."""
    path = tmp_path_factory.mktemp("store")
    for name in table.until("shard"):
        run_stage(name, CONFIG, Store(str(path)))
    return path


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, for starting one takes longer than most commands do."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def run(*args: str) -> "subprocess.CompletedProcess[str]":
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*args])
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
    (["frobnicate"], ("unknown command 'frobnicate'", "choose one of run, plan")),
    (["lss"], ("unknown command 'lss': perhaps you meant ls",)),
    (["bench", "nosuch"], ("unknown command 'bench nosuch': choose one of train, sample, loader, data, frontier",)),
    (["bench", "trian"], ("perhaps you meant bench train",)),
    (["run", "nope"], ("unknown preset 'nope'", "demo", "owt")),
    (["train", "missing/config.json"], ("missing/config.json", "No such file")),
    (["run", '{"model": {"n_layers": 0}}'], ("n_layers", "greater than or equal to 1")),
    (["run", "--train.lrr", "3"], ("unknown argument --train.lrr", "perhaps you meant --train.lr", "run --help")),
    (["launch", "--imag", "x"], ("unknown argument --imag", "launch --help")),
    (["ls", "here"], ("unknown argument here",)),
    (["run", "--train.lr", "abc"], ("--train.lr takes FLOAT, not 'abc'",)),
    (["run", "--train.lr", "-1"], ("--train.lr: Input should be greater than 0",)),
    (["run", "--schedule.kind", "quadratic"], ("--schedule.kind", "quadratic", "linear", "cosine", "sqrt")),
    (["run", "--model.d_model", "100", "--model.n_heads", "8"], ("d_model (100)", "n_heads (8)", "try")),
    (["run", "--train.min_lr", "1"], ("min_lr (1.0) is larger than lr",)),
    (["run", "--objective.kind", "block", "--objective.block_size", "512"], ("512", "seq_len (64)")),
    *(
        ([command, *words], (f"{' '.join(words)}: this run has none: set --sample.judge twin",))
        for command in ("run", "plan")
        for words in (["--until", "judge"], ["--until", "twin"], ["--rebuild", "judge"], ["--rebuild", "twin"])
    ),
    (["run", "--rebuild", "twin", "--sample.judge", "mine"], ("--rebuild twin: this run has none: its judge is mine",)),
    (
        ["run", "--until", "judge", "--rebuild", "report", "--sample.judge", "twin"],
        ("report comes after --until judge",),
    ),
    (["run", "--until", "split", "--rebuild", "train"], ("--rebuild train comes after --until split",)),
    (["run", "--data.source", "hf://a/b"], ("pinned commit", "--data.revision")),
    (["show"], ("missing URI", "nanodlm show --help")),
    (["train", "--inputs", "shard=1"], ("train reads --inputs shard=FINGERPRINT tokenizer=FINGERPRINT",)),
]


@pytest.mark.parametrize(("args", "says"), BAD, ids=lambda value: " ".join(value))
def test_bad_usage_is_one_line_and_exit_code_2(command: Command, args: list[str], says: tuple[str, ...]) -> None:
    _fails(command, 2, *args, says=says)


def test_debug_adds_the_traceback_and_an_unforeseen_error_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a\nb")

    monkeypatch.setattr(Store, "__init__", broken)
    _fails(command, 1, "ls", says=("nanodlm: RuntimeError: a b (add --debug for the traceback)",))
    assert "Traceback" in command("ls", "--debug").stderr


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return the arguments that a stage alone gets from some words."""
    calls: list[dict[str, Any]] = []

    def call(name: str, config: Any, how: Any, store: Any, out: Any) -> None:
        calls.append(locals())

    monkeypatch.setattr(run, "_run_alone", call)

    def parsed(*words: str) -> dict[str, Any]:
        arguments.parse("train", run.train, [*words])()
        return calls.pop()

    return parsed


@pytest.mark.parametrize(
    ("words", "resume", "use_wandb"),
    [
        (["--exp.resume"], True, False),
        (["--exp.use_wandb", "--exp.resume"], True, True),
        (["--exp.use-wandb", "--exp.resume", "False"], False, True),
        (["--exp.resume=False", "--exp.use_wandb", "True"], False, True),
    ],
)
def test_a_switch_may_stand_alone(
    parse: Callable[..., dict[str, Any]], words: list[str], resume: bool, use_wandb: bool
) -> None:
    for line in ([*words, "--train.lr", "0.1"], ["demo", "--train.lr", "0.1", *words]):
        config = parse(*line)["config"]
        assert (config.exp.resume, config.exp.use_wandb, config.train.lr) == (resume, use_wandb, 0.1)


def test_a_preset_is_a_name_a_file_or_json_and_flags_change_it(
    parse: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(CONFIG.model_dump_json())
    assert parse()["config"] == measured(PRESETS["demo"])
    assert parse("owt-1b")["config"] == PRESETS["owt-1b"]
    for preset in (str(tmp_path / "config.json"), CONFIG.model_dump_json()):
        assert parse(preset, "--train.seed", "7")["config"] == measured(CONFIG.replace(train={"seed": 7}))


def test_the_store_is_the_flag_else_the_environment_else_a_folder(
    parse: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANODLM_STORE", raising=False)
    assert parse()["store"].uri() == str(tmp_path / "data" / "store")
    monkeypatch.setenv("NANODLM_STORE", str(tmp_path / "a"))
    assert parse()["store"].uri() == str(tmp_path / "a")
    assert parse("--store", str(tmp_path / "b"))["store"].uri() == str(tmp_path / "b")


def test_help_and_version_exit_with_0(command: Command) -> None:
    text = command("--help").stdout
    assert "nanodlm COMMAND" in text
    assert all(f"  {name} " in text for name in COMMANDS)
    assert max(map(len, text.splitlines())) <= 80
    assert (command("bench", "--help").returncode, command().returncode, command("bench").returncode) == (0, 2, 2)
    assert command("--version").stdout.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command: Command, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = command(*name.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: nanodlm {name}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80, "a terminal would break a line anywhere"
    assert "(default: )" not in done.stdout
    assert ("--train.lr FLOAT" in done.stdout) == ("[PRESET]" in done.stdout)


def test_a_store_that_cannot_be_written_is_named(command: Command, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = str(tmp_path / "file" / "store")
    _fails(command, 1, "copy", str(prepared), store, says=("cannot write", "--store"))


def test_a_stage_alone_takes_its_inputs_by_fingerprint_and_looks_nothing_up(
    command: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dict(iter(Store(str(prepared))))
    given = []

    def run_stage(name: str, config: Config, store: Store, *, inputs: dict[str, Artifact] | None, **_: Any) -> None:
        given.append(inputs and {stage: artifact.fingerprint for stage, artifact in inputs.items()})
        raise NanodlmError("far enough")

    monkeypatch.setattr(run, "run_stage", run_stage)
    words = ["train", "--store", str(prepared), *PREPARED]
    needed = {name: made[name] for name in ("shard", "tokenizer")}
    _fails(command, 1, *words, "--inputs", *(f"{n}={f}" for n, f in needed.items()), says=("far enough",))
    _fails(command, 1, *words, says=("far enough",))
    assert given == [needed, None]
    _fails(command, 1, *words, "--inputs", "shard=0", "tokenizer=0", says=("no artifact at shard/0",))


def test_plan_says_field_by_field_why_a_stage_would_be_built(command: Command, prepared: Path) -> None:
    done = command("plan", "--store", str(prepared), *PREPARED, "--data.val_tokens", "30000", "--json")
    rows = {row["stage"]: row for row in result_of(done)["stages"]}
    assert list(rows) == list(table.NAMES)
    assert [rows[name]["action"] for name in table.until("shard")] == ["reuse", "reuse", "build", "build"]
    assert "val_tokens: 20000 -> 30000" in rows["split"]["why"]
    assert rows["shard"]["fingerprint"] is None


def test_the_configuration_that_is_printed_is_a_preset(command: Command, tmp_path: Path) -> None:
    flags = ("--train.eps", "1e-9", "--exp.run_name", "é: 1", "--data.source", "a.txt", "b.txt")
    printed = command("config", "demo", *flags).stdout
    assert "eps: 1.0e-09\n" in printed, "other readers of YAML take 1e-09 for a text"
    (tmp_path / "mine.yaml").write_text(printed)
    again = command("config", str(tmp_path / "mine.yaml"), "--json")
    assert result_of(again) == result_of(command("config", "demo", *flags, "--json"))
    assert result_of(again)["train"]["eps"] == 1e-9


def test_plan_does_nothing(command: Command, tmp_path: Path) -> None:
    done = command("plan", "--store", str(tmp_path / "new"), "--schedule.exponent", "3")  # of the demo
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("schedule.exponent 3.0 is read by nothing beside the other settings, and builds")
    assert re.search(r"\ndownload +build +[0-9a-f]{12}  nothing like it has been built yet\n", done.stdout)
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
    assert re.search(rf"\n  commit +{shown['code']['commit']}\n", text)
    assert shown["flow_run"] is None


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


def test_doctor_checks_this_machine_and_the_store(command: Command, tmp_path: Path) -> None:
    checks = result_of(command("doctor", "--store", str(tmp_path / "s"), "--json"))
    assert checks["ok"]
    assert {c["name"] for c in checks["checks"]} == {"python", "packages", "devices", "store", "corpus", "gpt2"}
    blocked = tmp_path / "file"
    blocked.write_text("")
    _fails(command, 1, "doctor", "--store", str(blocked / "s"), says=("1 of 6 checks failed: store",))


WRITTEN = [["ls"], ["plan", *PREPARED], ["config", "--json"], ["gc"], ["verify"], ["--help"], ["ls", "--help"]]


@pytest.mark.parametrize("words", WRITTEN, ids=lambda words: " ".join(words[:2]))
def test_output_that_leads_to_a_full_disk_is_one_line(
    command: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("NANODLM_STORE", str(prepared))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        _fails(command, 1, *words, says=("standard output: No space left on device; make room",))


FILLED = ["copy", "evaluate", "sample", "verify", "bench loader", "events"]


@pytest.mark.parametrize("what", FILLED)
def test_a_full_disk_is_one_line_that_names_the_place_and_running_again_continues(
    command: Command, trained: Artifact, tmp_path: Path, what: str
) -> None:
    store, config, events = tmp_path / "store", str(tmp_path / "config.json"), tmp_path / "events"
    Path(config).write_text(tiny().model_dump_json())
    events.write_bytes(bytes(3000))
    if what != "copy":
        shutil.copytree(trained.store.root, store, ignore=shutil.ignore_patterns("evaluate", "sample", "report"))
    if what == "verify":
        next(store.glob("shard/*/attempts/*/validation*")).write_bytes(b"")
    words, place = {
        "copy": (["copy", trained.store.uri(), str(store)], store),
        "verify": (["verify", "--repair"], store),
        "bench loader": (["bench", "loader", config, "--batches", "2"], "the temporary folder"),
        "events": (["evaluate", config, "--events", str(events)], events),
    }.get(what, ([what, config], store))
    words += ["--store", str(store)] if what not in ("copy", "bench loader") else []
    with full(380 if what == "sample" else 3000):
        said = command(*words)
    assert (said.returncode, said.stderr.count("\n")) == (1, 1), said.stderr
    line = said.stdout if what == "verify" else said.stderr
    assert f"nothing more fits into {place}" in line, said.stderr
    assert "File too large; make room" in line
    events.unlink()
    assert command(*words).returncode == 0
    assert command("verify", "--deep", "--store", str(store)).returncode == 0


@pytest.mark.slow
def test_a_training_that_fills_the_disk_says_one_line(trained: Artifact, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny().model_dump_json())
    shutil.copytree(trained.store.root, tmp_path / "store", ignore=shutil.ignore_patterns("train"))
    given = ["train", str(tmp_path / "config.json"), "--store", str(tmp_path / "store")]
    with full(4000):
        done = nanodlm(*given, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"))  # which is full as well
    assert done.returncode == 1
    assert re.fullmatch(rf"nanodlm: nothing more fits into {tmp_path}/store: .*; make room .*\n", done.stderr)
    assert nanodlm(*given).returncode == 0


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for temporary files, in a process of a user who has no home and is in no table of users."""
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def test_without_a_home_there_is_one_below_the_temporary_folder_unless_it_is_somebody_elses(
    command: Command, homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("plan", *PREPARED).returncode == 0
    assert Path.home() == homeless / f"nanodlm-{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    _fails(command, 2, "plan", says=(f"there is no home folder, and {homeless}/nanodlm-12345 is somebody else's",))


@pytest.mark.slow
def test_a_whole_run_needs_no_home(homeless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import pwd\npwd.getpwuid = {}.__getitem__\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    for name in ("NANODLM_CACHE", "PREFECT_HOME", "PREFECT_API_URL", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config.json").write_text(tiny().model_dump_json())
    done = nanodlm("run", "config.json", "--json", cwd=tmp_path)
    assert len(result_of(done)["stages"]) == 7
    assert (homeless / f"nanodlm-{os.getuid()}" / ".prefect" / "prefect.db").is_file()
    assert not list(tmp_path.rglob("~"))


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_what_a_training_writes_has_the_modes_that_the_umask_leaves(
    command: Command, trained: Artifact, tmp_path: Path, mask: int
) -> None:
    store, config = tmp_path / "store", tmp_path / "config.json"
    shutil.copytree(trained.store.root, store, ignore=shutil.ignore_patterns("train"))
    config.write_text(tiny().model_dump_json())
    before = os.umask(mask)
    try:
        told = ["--events", str(tmp_path / "told" / "events.jsonl")]
        assert command("train", str(config), "--store", str(store), *told).returncode == 0
    finally:
        os.umask(before)
    (checkpoints,) = store.glob("train/*/attempts/*/checkpoints")
    for folder in (checkpoints, tmp_path / "told"):
        for path in (folder, *folder.rglob("*")):
            whole = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == whole & ~mask, path


def test_a_command_does_what_is_left_to_its_end_and_is_not_taken_apart() -> None:
    program = """
import atexit, os
from nanodlm.cli import main

class Loaded:
    def __del__(self, say=os.write):
        say(1, b"taken apart")

def fail(words):
    atexit.register(print, "done at the end")
    raise main.UsageError("no")

loaded, main._run = Loaded(), fail
main.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "done at the end\n", "nanodlm: no\n")
