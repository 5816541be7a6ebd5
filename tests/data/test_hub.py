"""Data sets of the hub, from a loopback stand-in with the faults that networks have: a row of data/README.md each."""

import hashlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest

from nanodlm.config import PRESETS
from nanodlm.store import Artifact, Store
from tests.data.test_sources import write_tokens
from tests.support.helpers import flip
from tests.support.servers import Quiet, serving

ROOT = Path(__file__).parents[2]
NAME = PRESETS["owt"].data.source[0].removeprefix("hf://")
SHORT = PRESETS["owt"].data.revision
SHA = (SHORT + "0123456789abcdef" * 3)[:40]
FIRST, SECOND = (f"train-{i:05d}-of-00002.parquet" for i in range(2))
TOKEN = "hf_plantedhubtoken4711"


@dataclass
class Hub:
    """A stand-in's files and address, what it was asked for, and what it does wrong, by method and last name."""

    files: dict[str, bytes]
    address: str = ""
    log: list[str] = field(default_factory=list)
    faults: dict[str, Iterator[str]] = field(default_factory=dict)
    ranges: bool = True
    fetching: int = 0  # at this moment, and at most
    most: int = 0

    def got(self, name: str) -> list[str]:
        return [line for line in self.log if line.startswith(f"GET {name}")]


class Handler(Quiet):
    """The few addresses of the Hugging Face hub that a snapshot needs."""

    hub: Hub

    def do_GET(self) -> None:
        path, hub = self.path.split("?")[0], self.hub
        name = path.rpartition("/")[2]
        hub.log.append(f"{self.command} {name} {self.headers.get('Range', '')}")
        fault = next(hub.faults.get(f"{self.command} {name}", iter(())), "")
        if fault.isdecimal():
            code = {"X-Error-Code": "GatedRepo"} if fault in ("401", "403") else {"Retry-After": "1"}
            return self.answer(int(fault), b"", code)
        api, resolve = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/{SHA}/"
        if path == f"{api}/commits/main":
            about = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "t", "message": ""}
            return self.answer(200, json.dumps([{"id": commit, **about} for commit in (SHA, "f" * 40)]).encode(), {})
        if path == f"{api}/revision/{SHA}":
            about = {"id": NAME, "sha": SHA, "siblings": [{"rfilename": name} for name in hub.files]}
            return self.answer(200, json.dumps(about).encode(), {}, fault)
        if path == f"{api}/tree/{SHA}":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": f"{len(b):040x}"} for n, b in hub.files.items()]
            return self.answer(200, json.dumps(tree).encode(), {})
        if (name := path.removeprefix(resolve)) not in hub.files:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"})
        body = hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": SHA}
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if hub.ranges else 0
        self.answer(206 if start else 200, body[start:], headers, fault)

    do_HEAD = do_GET

    def answer(self, code: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(code)
        length = {} if fault == "short" else {"Content-Length": str(len(body))}
        for key, value in {**length, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.fetching += 1
        self.hub.most = max(self.hub.most, self.hub.fetching)
        time.sleep(0.05)
        self.hub.fetching -= 1
        body = body.swapcase() if fault == "altered" else body
        self.wfile.write(body[: len(body) // 2] if fault in ("reset", "early", "short", "stall") else body)
        if fault == "reset":
            self.wfile.flush()
            time.sleep(0.1)  # what was sent arrives
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        time.sleep(60 if fault == "stall" else 0)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A stand-in with one data set of two files, like those that the preset owt reads."""
    files = {"README.md": b"# Not a document"}
    for i, kind in enumerate((pa.uint16(), pa.int32())):
        rows = [[(i + j * k) % 50_000 for k in range(1024)] for j in range(40)]
        path = write_tokens(tmp_path / f"{i}.parquet", rows, pa.list_(kind))
        files[f"data/{(FIRST, SECOND)[i]}"] = path.read_bytes()
    hub = Hub(files)
    with serving(type("Handler", (Handler,), {"hub": hub})) as hub.address:
        yield hub


FETCH = """
import sys, time
from pathlib import Path
from nanodlm.data import hub
from nanodlm.errors import NanodlmError
from tests.data.test_sources import documents, download

store, name, limit, *revisions = sys.argv[1:]
events = []
for i, revision in enumerate(revisions):
    options = {"source": f"hf://{name}", "revision": revision, "column": "tokens", "pretokenized": True}
    started = time.monotonic()
    try:
        made = download(
            Path(store), f"d{i}", lambda kind, **told: events.append(told), tokenizer="gpt2",
            limit_tokens=int(limit) or None, **options,
        )
        print(sum(map(len, documents(made))), [told for told in events if told.get("unit") == "files"][-1:])
    except NanodlmError as error:
        print(type(error).__name__, error)
    print("took", time.monotonic() - started, file=sys.stderr)
"""


def fetching(hub: Hub, tmp_path: Path, *revisions: str, limit: int = 0, **own: str) -> "subprocess.Popen[str]":
    """A process that downloads the data set at each revision, and knows the hub by its address."""
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN, "NANODLM_RETRY_SECONDS": "2", **own}
    command = [sys.executable, "-c", FETCH, str(tmp_path / "store"), NAME, str(limit), *revisions]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=-1, stderr=-1, text=True)


def fetch(hub: Hub, tmp_path: Path, *revisions: str, limit: int = 0, **own: str) -> list[str]:
    """What downloading gives: a line for each revision, and no traceback and no token anywhere."""
    out, err = fetching(hub, tmp_path, *revisions, limit=limit, **own).communicate(timeout=120)
    assert "Traceback" not in err, err
    assert TOKEN not in out + err
    assert len(out.splitlines()) == len(revisions), err
    return out.splitlines()


WHOLE = f"{2 * 40 * 1024} [{{'done': 2.0, 'total': 2, 'unit': 'files'}}]"


def test_a_data_set_is_fetched_at_its_pinned_commit_once(tmp_path: Path, hub: Hub) -> None:
    assert fetch(hub, tmp_path, SHORT, SHA) == [WHOLE, WHOLE]
    (unknown,) = fetch(hub, tmp_path, "abcdef0")
    assert unknown == f"NanodlmError 0 commits of {NAME} begin with abcdef0: give --data.revision in full"
    assert [len(hub.got(name)) for name in (FIRST, SECOND, "README.md", SHA)] == [1, 1, 0, 1]


def test_what_is_cached_needs_no_hub_and_what_is_not_is_said_in_five_seconds(tmp_path: Path, hub: Hub) -> None:
    assert fetch(hub, tmp_path, SHORT) == [WHOLE]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and never answers
        for gone in ("http://127.0.0.1:9", f"http://127.0.0.1:{silent.getsockname()[1]}"):
            hub.address = gone
            assert fetch(hub, tmp_path, SHORT, SHA) == [WHOLE, WHOLE]
            process = fetching(hub, tmp_path / "cold", SHORT, NANODLM_RETRY_SECONDS="300")
            out, err = process.communicate(timeout=60)
            assert out.startswith(f"NanodlmError hf://{NAME} is not all in the cache, and {gone} does not answer: ")
            assert out.endswith(", or give copies as --data.source\n")
            assert float(err.split()[-1]) < 5, err


@pytest.mark.parametrize(
    ("faults", "resumed"),
    [
        ({"GET main": "503", f"GET {SHA}": "429", f"HEAD {FIRST}": "500", f"GET {FIRST}": "503 reset early"}, 2),
        ({"GET main": "429", f"GET {SHA}": "503 reset", f"HEAD {FIRST}": "429", f"GET {FIRST}": "429 500 short"}, 1),
        ({f"GET {FIRST}": "altered"}, 0),
    ],
)
def test_what_passes_is_tried_again(tmp_path: Path, hub: Hub, faults: dict[str, str], resumed: int) -> None:
    hub.faults |= {request: iter(given.split()) for request, given in faults.items()}
    started = time.monotonic()
    assert fetch(hub, tmp_path, SHORT, NANODLM_RETRY_SECONDS="30") == [WHOLE]
    assert not any(next(rest, "") for rest in hub.faults.values())
    waited = sum(given.count("429") for given in faults.values())  # with Retry-After: 1
    assert time.monotonic() - started > waited
    starts = [line for line in hub.got(FIRST) if not line.endswith("bytes=0-")]
    assert len(set(starts)) == len(starts) == resumed


@pytest.mark.parametrize(
    ("request_", "fault", "said"),
    [
        (f"GET {SHA}", "401", "set HF_TOKEN to a token that may read it, or give copies as --data.source"),
        (f"GET {SECOND}", "403", "set HF_TOKEN to a token that may read it, or give copies as --data.source"),
        (f"GET {SHA}", "404", "check its name and --data.revision, or give copies as --data.source"),
        (f"HEAD {SECOND}", "404", "check its name and --data.revision, or give copies as --data.source"),
        (f"GET {SECOND}", "503", "what is finished is kept, run again to continue"),
        (f"GET {SECOND}", "short", "what is finished is kept, run again to continue"),
        (f"GET {SECOND}", "reset", "what is finished is kept, run again to continue"),
        (f"GET {SECOND}", "altered", " arrived twice altered: run again later, or give copies as --data.source"),
    ],
)
def test_what_does_not_pass_is_one_line_with_its_advice(
    tmp_path: Path, hub: Hub, request_: str, fault: str, said: str
) -> None:
    hub.faults[request_] = itertools.repeat(fault)
    hub.ranges = False  # else each answer brings more, however small
    failed = fetch(hub, tmp_path, SHA)[0]
    which = f"data/{SECOND} of " if SECOND in request_ else ""
    assert f"{which}hf://{NAME}" in failed
    assert failed.endswith(said)
    assert ("run again" in failed) == (fault not in ("401", "403", "404"))
    if fault in ("503", "short", "reset"):
        hub.faults.clear()
        assert fetch(hub, tmp_path, SHA) == [WHOLE]
        assert len(hub.got(FIRST)) == 1  # it was kept


def test_what_the_library_has_cached_needs_no_hub_if_it_is_whole(tmp_path: Path, hub: Hub) -> None:
    code = f"import huggingface_hub as h; print(h.snapshot_download({NAME!r}, repo_type='dataset', revision={SHA!r}))"
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    folder = Path(subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip())
    hub.address = "http://127.0.0.1:9"
    assert fetch(hub, tmp_path, SHORT) == [WHOLE]
    (folder / "data" / SECOND).unlink()
    (refused,) = fetch(hub, tmp_path / "other", SHORT, HF_HOME=str(tmp_path / "hf"))
    assert " is not all in the cache, and " in refused


def test_an_altered_file_of_the_cache_is_fetched_again(tmp_path: Path, hub: Hub) -> None:
    assert fetch(hub, tmp_path, SHA) == [WHOLE]
    digest = hashlib.sha256(hub.files[f"data/{SECOND}"]).hexdigest()
    (blob,) = (tmp_path / "hf").rglob(f"blobs/{digest}")
    flip(blob)
    assert fetch(hub, tmp_path, SHA) == [WHOLE]
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest
    assert [len(hub.got(name)) for name in (FIRST, SECOND)] == [1, 2]


def test_a_killed_fetch_is_gone_on_with_in_the_middle_of_a_file(tmp_path: Path, hub: Hub) -> None:
    hub.faults[f"GET {SECOND}"] = iter(["stall"])
    half = len(hub.files[f"data/{SECOND}"]) // 2
    process = fetching(hub, tmp_path, SHA)
    deadline = time.monotonic() + 60
    parts = f"nanodlm/{'[0-9a-f]' * 64}"
    while not (hub.got(SECOND) and any(p.stat().st_size >= half // 2 for p in (tmp_path / "hf").rglob(parts))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert fetch(hub, tmp_path, SHA) == [WHOLE]
    assert len(hub.got(FIRST)) == 1
    start = int(hub.got(SECOND)[1].partition("bytes=")[2][:-1])
    assert half // 2 <= start <= half


def test_files_are_fetched_together_up_to_a_number_and_no_more_than_a_limit_needs(tmp_path: Path, hub: Hub) -> None:
    hub.files |= {f"data/{i}.parquet": hub.files[f"data/{FIRST}"] + bytes(i) for i in range(12)}
    (line,) = fetch(hub, tmp_path, SHA, limit=2048)
    assert line == "2048 []"
    assert [len(hub.got(f"{i}.parquet")) for i in range(12)] == [1] + [0] * 11
    hub.most = 0
    _ = fetch(hub, tmp_path, SHA)
    assert 2 <= hub.most <= 8


def test_the_preset_owt_runs_as_it_is(tmp_path: Path, hub: Hub) -> None:
    """But for fewer tokens; and no token of the hub is in its output, its manifests or its logs."""
    options = ["--until", "shard", "--data.val_tokens", "4096", "--data.limit_tokens", "60000"]
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "nanodlm", "run", "owt", *options, "--store", str(tmp_path / "store")]
    env |= {"HF_TOKEN": TOKEN}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    store = Store(str(tmp_path / "store"))
    made = {
        artifact.stage: artifact.metrics for _, artifact in store.artifacts(store) if isinstance(artifact, Artifact)
    }
    assert made["shard"]["train_rows"] > 50
    written = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in text for text in [*written, done.stdout.encode(), done.stderr.encode()])


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, hub: Hub) -> None:
    hub.files["../../outside.parquet"] = b""
    (said,) = fetch(hub, tmp_path, SHA)
    assert "names '../../outside.parquet', which leaves its folder" in said
