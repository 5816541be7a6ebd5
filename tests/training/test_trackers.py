"""Where log records go: the JSONL file and W&B offline, both read back from what was written."""

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import nanodlm
from nanodlm.config import PRESETS
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.stages import run as stages_run
from nanodlm.stages import table
from nanodlm.store import Store
from nanodlm.store.cache import cache_dir
from nanodlm.training.trackers import Tracker
from tests.support.training import tiny

ROOT = Path(nanodlm.__file__).parents[1]
API_KEY = "5ec7e75ec7e75ec7e75ec7e75ec7e75ec7e75ec7"
RECORDS = [{"step": 10, "loss": 3.5, "lr": 0.25}, {"step": 20, "loss": 3.25, "lr": 0.125}]


def open_tracker(folder: Path, *, records: Any = (), said: Any = None, **exp: Any) -> Tracker:
    def emit(kind: str, text: str) -> None:
        assert kind == "message"
        if said is not None:
            said.append(text)

    return Tracker(PRESETS["demo"].replace(exp=exp), folder / "logs.jsonl", "a1b2", records, emit)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """W&B offline, with a key; whatever it would send anywhere arrives at this listener instead."""
    home = dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"), str(tmp_path / "home"))
    for name, value in {**home, "WANDB_MODE": "offline", "WANDB_API_KEY": API_KEY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, address)
        yield listener


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: protocol buffers in LevelDB's log format, after seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # a block's end, too short for a header
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_run(file: Path) -> Any:
    (run,) = [record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run"]
    return run


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Every row's step and values but for those that W&B adds, such as the time."""
    found = []
    for row in (record.history for record in wandb_records(file) if record.WhichOneof("record_type") == "history"):
        values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
        found.append({"step": row.step.num, **{k: v for k, v in values.items() if not k.startswith("_")}})
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_jsonl_file_begins_with_restored_records_and_holds_each_new_one_at_once(tmp_path: Path) -> None:
    with open_tracker(tmp_path, records=RECORDS[:1]) as tracker:
        assert lines(tmp_path / "logs.jsonl") == RECORDS[:1]
        tracker.log(RECORDS[1])
        assert lines(tmp_path / "logs.jsonl") == RECORDS


def test_nothing_but_the_jsonl_file_is_written_unless_asked_for(tmp_path: Path) -> None:
    with open_tracker(tmp_path, said=(said := [])) as tracker:
        tracker.log(RECORDS[0])
    assert (said, [p.name for p in tmp_path.iterdir()]) == ([], ["logs.jsonl"])


def test_a_missing_package_is_named_with_its_extra_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UsageError, match=r"--exp\.use_wandb needs wandb: pip install -c constraints\.txt -e '\.\[wandb\]'"
    ):
        open_tracker(tmp_path, use_wandb=True)
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline_holds_the_records_and_settings_contacts_nobody_and_leaves_no_key_and_no_process(
    offline: socket.socket, tmp_path: Path
) -> None:
    exp = {"use_wandb": True, "project_name": "planets", "run_name": "mars"}
    with open_tracker(tmp_path, said=(said := []), **exp) as tracker:
        for record in RECORDS:
            tracker.log(record)
        assert sys.platform != "linux" or len(service_of(os.getpid())) == 1
    assert sys.platform != "linux" or service_of(os.getpid()) == []
    (file,) = cache_dir().glob("wandb/offline-run-*-a1b2/run-a1b2.wandb")
    assert wandb_history(file) == RECORDS
    run = wandb_run(file)
    assert (run.project, run.display_name, run.run_id) == ("planets", "mars", "a1b2")
    settings = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert settings["train"] == PRESETS["demo"].train.model_dump()
    assert said == [f"records for W&B: {file.parent}"]
    with pytest.raises(BlockingIOError):
        offline.accept()
    assert [p for p in tmp_path.rglob("*") if p.is_file() and API_KEY.encode() in p.read_bytes()] == []


def test_a_resumed_run_continues_at_wandb_and_its_files_go_where_wandb_dir_says(
    offline: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    with open_tracker(tmp_path, use_wandb=True, records=RECORDS[:1]) as tracker:
        tracker.log(RECORDS[1])
    (file,) = tmp_path.glob("elsewhere/wandb/offline-run-*/run-a1b2.wandb")
    assert not (cache_dir() / "wandb").exists()
    assert wandb_run(file).resume
    assert wandb_history(file) == RECORDS[1:]


def service_of(pid: int) -> list[int]:
    """W&B's processes among a process's children."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [int(child) for file in threads for child in file.read_text().split()]
    return [child for child in pids if "wandb" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_outlives_the_process_that_wandb_starts(offline: socket.socket, tmp_path: Path) -> None:
    code = (  # in a process of its own, for W&B leaves its dead child to the interpreter
        "import os, sys; from pathlib import Path\n"
        "from tests.training.test_trackers import RECORDS, open_tracker, service_of\n"
        "with open_tracker(Path(sys.argv[1]), said=(said := []), use_wandb=True) as tracker:\n"
        "    os.kill(*service_of(os.getpid()), 9)\n"
        "    for record in RECORDS: tracker.log(record)\n"
        "print(said[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("W&B failed and gets no more records, the run goes on: ")
    assert lines(tmp_path / "logs.jsonl") == RECORDS


def test_wandb_that_does_not_start_is_said_before_the_training_with_what_to_do(
    offline: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wandb.init", Mock(side_effect=OSError("no route\nto host")))
    with pytest.raises(NanodlmError, match=r"W&B did not start \(no route to host\): .*WANDB_MODE=offline"):
        open_tracker(tmp_path, use_wandb=True)


def test_wandb_that_fails_is_named_once_and_the_file_gets_every_record(
    offline: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tracker(tmp_path, said=(said := []), use_wandb=True) as tracker:
        monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", Mock(side_effect=OSError("no space left")))
        for record in RECORDS:
            tracker.log(record)
    assert said[1:] == ["W&B failed and gets no more records, the run goes on: no space left"]
    assert lines(tmp_path / "logs.jsonl") == RECORDS


def test_an_interrupted_training_leaves_whole_records_everywhere_and_none_but_json_in_its_artifact(
    offline: socket.socket, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    asking = tiny(exp={"save_every": 5, "log_every": 3, "use_wandb": True})
    for name in table.until("shard"):
        stages_run.run_stage(name, asking, store)

    seen: list[list[dict[str, Any]]] = []

    def cut(kind: str, **fields: Any) -> None:
        if kind == "progress":
            (file,) = tmp_path.glob("store/train/*/attempts/*/logs.jsonl")
            seen.append(lines(file))
            if fields["done"] == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages_run.run_stage("train", asking, store, emit=cut)
    assert [[record["step"] for record in records] for records in seen] == [[3], [3, 6], [3, 6, 9], [3, 6, 9, 12]]
    run, _ = stages_run.run_stage("train", asking, store)
    assert run.metrics["resumed_from_update"] == 10
    records = lines(run.local() / "logs.jsonl")
    assert records == json.loads((run.local() / "logs.json").read_text())
    assert records[:3] == seen[-1][:3]
    timed = {"tokens_per_second": 0, "waiting_share": 0, "seconds": 0}
    assert {**records[3], **timed} == {**seen[-1][3], **timed}
    run_id = run.fingerprint[:16]
    first, second = sorted(cache_dir().glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert wandb_history(first) == seen[-1]
    assert wandb_history(second) == records[3:]
    names = {
        file["path"]
        for file in run.manifest["files"]
        if not file["path"].startswith(("checkpoints/", "parts/", "token"))
    }
    assert names == {"config.json", "logs.json", "logs.jsonl", "parameters.json"}
