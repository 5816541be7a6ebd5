"""The pipeline under random kills and faults ends with undisturbed bits, on disk and on S3.

SOAK_EVENTS=200 pytest -m soak -n 0 -s tests/store/test_soak.py -k s3       # or disk; half an hour
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
from nanodlm.stages.table import until
from nanodlm.store import Store
from nanodlm.upkeep.verify import chain, check
config, store, last = load_config(sys.argv[1]), Store(sys.argv[2]), sys.argv[3]
rebuilt = set()
if sys.argv[4] == "repair":
    found = check(store, chain(store, *store), deep=True, repair=True)
    rebuilt = {c.stage for c in found if c.problems and not c.repaired}  # as it says when a manifest cannot be read
if rebuilt or sys.argv[4] == "run":
    for name in until(last):
        run_stage(name, config, store, rebuild=name in rebuilt)
"""


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
def process(*words: str) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", RUN, *words]
    with subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)


def results(store: Store, last: str) -> dict[str, str]:
    """What must be the same: digests of the data, of the parameters, of the evaluation and of the samples."""
    digests = {}
    for lookup in stages_lookup.look_up(CONFIG, store, last):
        assert lookup.artifact is not None, lookup.stage.name
        digests[lookup.stage.name] = lookup.artifact.digest
    return digests


def damage(store: Store, moments: random.Random) -> str:
    """Flip a byte of a committed artifact, cut it off, delete a file, swap two, or tear the manifest; say which."""
    stage, fingerprint = moments.choice(list(store))
    artifact = store.open(f"{stage}/{fingerprint}")
    paths = [artifact.remote(file["path"]) for file in artifact.files() if file["size"]]
    path = moments.choice(paths)
    content = store.driver.read(path, 1 << 30)
    kind = moments.choice(["flip", "cut", "delete", "swap", "tear"])
    at = moments.randrange(len(content))
    if kind == "swap" and len(paths) > 1:
        other = moments.choice([p for p in paths if p != path])
        store.driver.write(path, store.driver.read(other, 1 << 30))
        store.driver.write(other, content)
    elif kind == "delete":
        store.remove(path)
    elif kind == "tear":
        manifest = store.path(stage, fingerprint, "manifest.json")
        whole = store.driver.read(manifest, 1 << 30)
        store.driver.write(manifest, whole[: moments.randrange(len(whole))])
    else:
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        store.driver.write(path, flipped if kind != "cut" else content[:at])
    return kind


def soak(url: str, folder: Path, events: int, last: str, patience: float, wire: Wire) -> None:
    """Kill (within `patience` seconds) and damage so many times, then compare with an undisturbed run.

    Whenever the store is complete it is damaged, and begins anew with what it lost.
    """
    undisturbed = Store(str(folder / "undisturbed"))
    for name in table.until(last):
        run.run_stage(name, CONFIG, undisturbed)
    expected = results(undisturbed, last)
    config = folder / "config.json"
    config.write_text(CONFIG.model_dump_json())
    store, moments, complete = Store(url), random.Random(0), False
    happened: Counter[str] = Counter()
    while happened.total() - happened["refused"] < events:
        if complete:
            happened[damage(store, moments)] += 1
        print(json.dumps(happened), wire.faults, flush=True)
        wire.share = moments.choice([0.0, 0.05, 0.2])
        with process(str(config), url, last, "repair" if complete else "run") as running:
            try:
                _, said = running.communicate(timeout=moments.uniform(1, patience) if moments.random() < 0.75 else 120)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.communicate()
                happened["kill"] += 1
                complete = False
                continue
        wire.share = 0.0
        if running.returncode:  # refused by name, never accepted
            assert "damaged" in said or "manifest" in said or "altered" in said, said
            happened["refused"] += 1
            with process(str(config), url, last, "repair") as repairing:
                assert repairing.wait(120) == 0
            complete = False
        else:  # a torn manifest is set aside by a repair, and built by the next run
            complete = not complete
            assert not complete or results(store, last) == expected
    wire.share = 0.0
    for what in ("repair", "run"):
        with process(str(config), url, last, what) as ending:
            assert ending.wait(200) == 0
    assert results(store, last) == expected
    assert not [c for c in verify.check(store, list(store), deep=True) if c.problems]


@pytest.fixture(params=["disk", "s3"])
def target(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Wire]]:
    """URL of an empty store, and the wire that it is behind if it is on S3."""
    wire = Wire()
    if request.param == "disk":
        yield str(tmp_path / "store"), wire
        return
    server: servers.Server = request.getfixturevalue("seaweedfs_server")
    with servers.flaky(server, wire.fate) as flaky:
        flaky.enter(monkeypatch)
        yield f"{server.store}/soak-{tmp_path.name}", wire


@pytest.mark.slow
def test_a_dozen_kills_and_damages_of_the_data_stages_change_no_bit(target: tuple[str, Wire], tmp_path: Path) -> None:
    soak(target[0], tmp_path, 12, "shard", 3.0, target[1])


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kills_and_damages_and_a_failing_network_change_no_bit(target: tuple[str, Wire], tmp_path: Path) -> None:
    soak(target[0], tmp_path, int(os.environ.get("SOAK_EVENTS", "200")), "sample", 9.0, target[1])
