"""The pipeline under random kills and faults: it must end with the bits of an undisturbed run.

SOAK_EVENTS=200 pytest tests/store/test_soak.py -m slow -n 0 -s
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanodlm.config import PRESETS
from nanodlm.stages import lookup as stages_lookup
from nanodlm.stages import run, table
from nanodlm.store import Store
from nanodlm.upkeep import verify
from tests.support import servers
from tests.support.commands import environment, speeches

CONFIG = PRESETS["demo"].replace(
    data={"source": speeches(12), "val_tokens": 20000, "tokenizer": "bytes", "part_mb": 0.05},
    model={"n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 64, "seq_len": 32},
    train={"max_steps": 60, "warmup_steps": 5, "cooldown_steps": 5},
    eval={"max_rows": 100},
    sample={"num_steps": 8, "num_samples": 2},
    exp={"save_every": 4, "val_rows": 0},
)
RUN = """
import sys
from nanodlm.config import load_config
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import STAGES, until
from nanodlm.store import Store
from nanodlm.upkeep.verify import check
config, store = load_config(sys.argv[1]), Store(sys.argv[2])
if sys.argv[3] == "repair":
    found = sorted(store, key=lambda item: list(STAGES).index(item[0]))
    print([c for c in check(store, found, deep=True, repair=True) if c.problems and not c.repaired])
else:
    for name in until("sample"):
        run_stage(name, config, store)
"""


EVENTS = int(os.environ.get("SOAK_EVENTS", "12"))


class Wire:
    """Lets a share of requests fail: answered with 503, cut off before they were heard, or after."""

    def __init__(self) -> None:
        self.share, self.faults, self._moments = 0.0, 0, random.Random(1)

    def fate(self, method: str, path: str) -> str:
        if self._moments.random() >= self.share:
            return ""
        self.faults += 1
        return self._moments.choice(["busy", "reset", "unheard"])


@contextmanager
def process(store: str, config: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", RUN, str(config), store, what]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=environment(), text=True, start_new_session=True, **pipes) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)


def results(store: Store) -> dict[str, str]:
    """What must be the same: digests of the data, of the parameters, of the evaluation and of the samples."""
    digests = {}
    for lookup in stages_lookup.look_up(CONFIG, store, "sample"):
        assert lookup.artifact is not None, lookup.stage.name
        digests[lookup.stage.name] = lookup.artifact.digest
    return digests


def damage(store: Store, moments: random.Random) -> str:
    """Alter a committed artifact: flip a byte, cut one off, delete a file, swap two, or tear the manifest."""
    stage, fingerprint = moments.choice(list(store))
    artifact = store.find(stage, fingerprint)
    assert artifact is not None
    paths = [artifact.remote(file["path"]) for file in artifact.manifest["files"] if file["size"]]
    path = moments.choice(paths)
    content = store.read(path)
    kind = moments.choice(["flip", "cut", "delete", "swap", "tear"])
    if kind == "swap" and len(paths) > 1:
        other = moments.choice([p for p in paths if p != path])
        content, swapped = store.read(other), content
        store.fs.pipe_file(other, swapped)
        store.fs.pipe_file(path, content)
    elif kind == "delete":
        store.remove(path)
    elif kind == "tear":
        manifest = store.path(stage, fingerprint, "manifest.json")
        whole = store.read(manifest)
        store.fs.pipe_file(manifest, whole[: moments.randrange(len(whole))])
    else:
        at = moments.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        store.fs.pipe_file(path, flipped if kind != "cut" else content[:at])
    return f"{kind} {stage}"


def soak(url: str, expected: dict[str, str], config: Path, events: int, wire: Wire | None = None) -> Counter[str]:
    """So many kills and faults over the pipeline, which begins anew with what it lost whenever it is complete."""
    moments, happened, complete = random.Random(0), Counter(), False
    store = Store(url)
    while happened.total() - happened["refused"] - happened["network"] < events:
        if complete:
            happened[damage(store, moments).partition(" ")[0]] += 1
        print(json.dumps(happened), flush=True)
        if wire:
            wire.share = moments.choice([0.0, 0.05, 0.2])
        with process(url, config, "repair" if complete else "run") as running:
            try:
                patience = moments.uniform(1.0, 9.0) if moments.random() < 0.75 else 120.0
                _, said = running.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.communicate()
                happened["kill"] += 1
                complete = False
                continue
        if wire:
            happened["network"], wire.share = wire.faults, 0.0
        if running.returncode:  # refused by name, never accepted
            assert "damaged" in said or "manifest" in said or "altered" in said, said
            happened["refused"] += 1
            with process(url, config, "repair") as repairing:
                assert repairing.wait(120) == 0
            complete = False
            continue
        if complete:  # a torn manifest is set aside by a repair, and built by the next run
            complete = False
            continue
        complete = True
        assert results(store) == expected
    if wire:
        wire.share = 0.0
    for what in ("repair", "run"):
        with process(url, config, what) as last:
            assert last.wait(200) == 0
    return happened


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    store = Store(str(tmp_path_factory.mktemp("undisturbed")))
    for name in table.until("sample"):
        run.run_stage(name, CONFIG, store)
    return results(store)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_and_damage_on_local_disk_change_no_bit(undisturbed: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(CONFIG.model_dump_json())
    happened = soak(str(tmp_path / "store"), undisturbed, config, EVENTS)
    store = Store(str(tmp_path / "store"))
    assert results(store) == undisturbed
    assert not [c for c in verify.check(store, list(store), deep=True) if c.problems]
    print(json.dumps(happened))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_damage_and_a_failing_network_on_s3_change_no_bit(
    undisturbed: dict[str, str], tmp_path: Path, seaweedfs_server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, wire = tmp_path / "config.json", Wire()
    config.write_text(CONFIG.model_dump_json())
    url = f"{seaweedfs_server.store}/soak"
    with servers.flaky(seaweedfs_server, wire.fate) as server:
        server.enter(monkeypatch)
        happened = soak(url, undisturbed, config, EVENTS, wire)
    seaweedfs_server.enter(monkeypatch)
    assert results(Store(url)) == undisturbed
    assert not [c for c in verify.check(Store(url), list(Store(url)), deep=True) if c.problems]
    print(json.dumps(happened))
