"""Measure commands on a store of thousands of artifacts, and the adoption of thousands of finished shards.

    python -m benchmarks.scale FOLDER                               # 5,000 artifacts, 2,000 shards: some minutes
    python -m benchmarks.scale s3://bucket/prefix --artifacts 404   # its requests are counted by a proxy

What is made stays, below `scale-5000` there, and is used again by the next measurement. A bucket's server is named by
`$AWS_ENDPOINT_URL` or `$STORAGE_EMULATOR_HOST`, as plain http; the requests of one that is not are not counted.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import tyro

from benchmarks.wire import counted
from nanodlm.config import PRESETS, Config
from nanodlm.data import rows
from nanodlm.errors import Emit, silent
from nanodlm.stages.lookup import identify
from nanodlm.stages.run import build
from nanodlm.stages.table import STAGES, Stage
from nanodlm.store import Artifact, Attempt, Store, new_attempt

DATA, MODEL = ("download", "tokenizer", "split", "shard"), ("train", "evaluate", "sample", "report")
MODELS = 4  # trained on each corpus
COMMANDS = {
    "ls": ["ls"],
    "plan": ["plan", "demo", "--train.lr", "0.5"],  # the data are there; training is compared with all there are
    "gc": ["gc", "--dry_run"],
    "verify": ["verify"],
}
CHECKPOINT = (
    ["_CHECKPOINT_METADATA", "commit_success.txt"]
    + [f"{state}/{name}" for state in ("model_state", "optimizer_state") for name in ("_METADATA", "_sharding")]
    + [f"{state}/array_metadatas/process_0" for state in ("model_state", "optimizer_state")]
    + [f"{state}/ocdbt.process_0/d/{i:032x}" for state in ("model_state", "optimizer_state") for i in range(8)]
)
CHECKPOINTS = ("checkpoints/step_001000", "checkpoints/step_001200")
# What each stage of the demo leaves: finished parts with their files, other files, and measurements that `ls` shows.
PARTS = {
    "download": {name: [name] for name in (f"part-{i:05d}.arrow" for i in range(6))},
    "shard": {rows.name(i): [rows.name(i)] for i in range(6)},
    "train": {name: [f"{name}/{file}" for file in CHECKPOINT] for name in CHECKPOINTS},
}
OTHERS = {
    "tokenizer": ["ranks.tiktoken", "tokenizer.json"],
    "split": ["split.json", "validation.npy"],
    "shard": ["card.json", "counts.npy", "validation.arrayrecord"],
    "train": ["config.json", "logs.json", "logs.jsonl", "parameters.json", "tokenizer/ranks.tiktoken"],
    "evaluate": ["metrics.json"],
    "sample": ["samples.jsonl", "samples.txt", "tokens.npy"],
    "report": ["report.html", "report.md"],
}
METRICS: dict[str, dict[str, Any]] = {
    "download": {"documents": 249, "bytes": 12186747, "parts": 6},
    "tokenizer": {"n_vocab": 4095},
    "split": {"documents": 249, "val_documents": 82, "val_tokens": 1000000},
    "shard": {"train_rows": 28925, "seq_len": 64, "val_rows": 15625, "rows_per_shard": [4820] * 6},
    "train": {"updates": 1200, "trained_tokens": 614400, "train_tokens_per_second": 5376.3, "parameters": 919680}
    | {"devices": 2, "device": "cpu"},
    "evaluate": {"val_bits_per_byte": 2.0332, "val_bits_per_byte_stderr": 0.0267},
    "sample": {"samples": 2, "first_sample": "for the country " * 16},
    "report": {"below_unigram_percent": 10.13},
}
COUNTS = list(range(4095))  # as the record of a shard holds one for each token
SHARDS = "f" * 64


def scale(
    url: Annotated[str, tyro.conf.Positional], artifacts: int = 5000, shards: int = 2000, repeats: int = 3
) -> dict[str, Any]:
    """Time commands as a user would run them, each in a process of its own, and the adoption of shards.

    Args:
        url: A folder, or a store on S3 or GCS.
        artifacts: Artifacts of the store, whole chains from the download to the report.
        shards: Finished shards of a killed attempt, which the next one adopts.
        repeats: Runs of each command, of which medians are told.

    Returns:
        For each of `ls`, `plan`, `gc` and `verify`, and for `finish` and `adopt` of the shards, its `seconds`, and as
        `cpu_seconds` those of the processors, which other work changes less; on a bucket with its `requests`, by
        method, and their sum as `total`; on local disk, where `strace` is installed, with the system calls that name
        a file or ask for its state, for each shard, as `calls_per_shard`.
    """
    store = Store(Store(url).uri(f"scale-{artifacts}"))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["NANODLM_CACHE"] = scratch
        _make_store(store.uri(), artifacts)
        for name, words in COMMANDS.items():
            command = ["-m", "nanodlm", *words, "--store", store.uri()]
            runs = [_run(command) for _ in range(repeats)]
            result[name] = runs[-1] | {key: median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
            print(f"{name:<8} {result[name]}", flush=True)
        if shards:
            place = Store(url).uri(f"shards-{time.time_ns()}")
            for name in ("finish", "adopt"):
                result[name] = _run(_shards(name, place, shards))
                print(f"{name:<8} {result[name]}", flush=True)
            if Store(url).is_local and shutil.which("strace"):
                calls = _system_calls(place, shards) - _system_calls(place, 0)
                result["adopt"]["calls_per_shard"] = calls / shards
                print(f"{'':<8} {calls / shards:.1f} system calls on files for each shard that is adopted")
    return result


def _run(command: list[str]) -> dict[str, Any]:
    """Run a Python command to its end: its seconds, or those that it prints itself, the processors', its requests."""
    with counted() as (variables, counts):
        began, used = time.perf_counter(), sum(os.times()[2:4])
        words = [sys.executable, *command]
        done = subprocess.run(words, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - began
    last = (done.stdout.splitlines() or [""])[-1]
    told = json.loads(last) if last.startswith("{") else {"seconds": round(seconds, 3)}
    told["cpu_seconds"] = round(sum(os.times()[2:4]) - used, 3)
    return {**told, **({"requests": dict(counts), "total": counts.total()} if counts else {})}


def _make_store(url: str, artifacts: int) -> None:
    """Fill a store up to so many artifacts, several chains at a time."""
    there, each = len(list(Store(url))), len(DATA) + MODELS * len(MODEL)
    corpora = range(there // each, -(-artifacts // each)) if there < artifacts else range(0)
    began = time.perf_counter()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        wanted = [min(each, artifacts - corpus * each) for corpus in corpora]
        made = sum(pool.map(_make_chains, [url] * len(corpora), corpora, wanted))
    print(f"{made} artifacts made in {time.perf_counter() - began:.0f} s", flush=True)


def _make_chains(url: str, corpus: int, wanted: int) -> int:
    """Make the artifacts of one corpus and of the models trained on it, but no more than are wanted."""
    store, base = Store(url), PRESETS["demo"]
    base = base.replace(data={"part_mb": base.data.part_mb + corpus})
    made: dict[str, Artifact] = {}
    names = [(name, base) for name in DATA]
    for seed in range(MODELS):
        names += [(name, base.replace(train={"seed": base.train.seed + seed})) for name in MODEL]
    for name, config in names[:wanted]:
        lookup = identify(STAGES[name], config, {source: made[source] for source in STAGES[name].inputs(config)})
        with patch.object(Stage, "run", lambda _, *given: _fill(*given)):
            made[name], _ = build(lookup, config, store, False, silent)
    return wanted


def _fill(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Write small files by the names of those that a stage leaves, in place of its work; return its measurements."""

    def write(files: list[str]) -> None:
        for file in files:
            (attempt.path / file).parent.mkdir(parents=True, exist_ok=True)
            (attempt.path / file).write_text(f"{file} of {attempt.fingerprint}\n")

    for name, files in PARTS.get(attempt.stage, {}).items():
        write(files)
        attempt.finish(name, files, **({"counts": COUNTS} if attempt.stage == "shard" else {"metrics": METRICS}))
    write(OTHERS.get(attempt.stage, []))
    return METRICS[attempt.stage]


def _shards(what: str, url: str, count: int) -> list[str]:
    return ["-c", f"from benchmarks.scale import {what}; {what}({url!r}, {count})"]


def finish(url: str, count: int) -> None:
    """Finish so many shards in an attempt that is then killed, and print how long that took."""
    with new_attempt(Store(url), "shard", SHARDS) as attempt:
        began = time.perf_counter()
        for i in range(count):
            (attempt.path / rows.name(i)).write_bytes(os.urandom(64_000))
            attempt.finish(rows.name(i), [rows.name(i)], counts=COUNTS)
        _end(began)


def adopt(url: str, count: int) -> None:
    """Adopt so many shards in another attempt that is then killed, and print how long that took."""
    with new_attempt(Store(url), "shard", SHARDS) as attempt:
        began = time.perf_counter()
        assert len(attempt.adopt_finished(map(rows.name, range(count)))) == count
        _end(began)


def _end(began: float) -> None:
    print(json.dumps({"seconds": round(time.perf_counter() - began, 3)}), flush=True)
    os._exit(0)


def _system_calls(url: str, count: int) -> int:
    """Count the system calls that name a file, or ask for the state of an open one, while shards are adopted."""
    with tempfile.NamedTemporaryFile("r") as table:
        watched = ["strace", "-f", "-c", "-e", "trace=%file,%fstat", "-o", table.name, sys.executable]
        subprocess.run([*watched, *_shards("adopt", url, count)], stdout=subprocess.DEVNULL, check=True)
        # The last row is `100.00  seconds  µs/call  calls  errors  total`, where errors may be missing.
        return int(Path(table.name).read_text().splitlines()[-1].split()[3])


if __name__ == "__main__":
    tyro.cli(scale, use_underscores=True)
