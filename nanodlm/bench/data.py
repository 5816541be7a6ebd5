"""Speed and memory of preparing data, on a corpus made up for it: each stage in a process of its own.

    nanodlm bench data owt                        # ten million tokens in rows of 1,024 ids, and as many as texts
    nanodlm bench data owt --tokens 100000000

Speeds are in tokens per second of CPU time, of all threads, beside plain references on the same corpus. In its process
each stage prepares a small corpus before, so that loading code is not measured.
"""

import hashlib
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from nanodlm.config import Config, DataConfig
from nanodlm.errors import Emit, UsageError, silent
from nanodlm.stages.run import run_stage
from nanodlm.store import Json, Store

SMALL = 50_000  # tokens of the corpus that is prepared before
ROW, ROWS = 1024, 1000  # ids in a row, and rows or texts in a batch
STAGES = ("download", "tokenizer", "split", "shard")
WHOLE = ("download", "split", "shard")  # a tokenizer is trained on a sample, however large the corpus is
REFERENCES = {  # what each is compared with
    "ids": {"download": "parquet read", "split": "blake2b", "shard": "ArrayRecord write"},
    "text": {"download": "parquet read", "end to end": "encode_ordinary_batch"},
}


def data(config: Config, *, tokens: int = 10_000_000, emit: Emit = silent) -> dict[str, dict[str, Json]]:
    """Prepare about so many tokens as `ids` and as `text`, with the settings of a configuration but for its source.

    Returns by kind, and by stage, `end to end` or name of a reference: `tokens_per_second_per_core`, `of_reference`
    where `REFERENCES` names one, and of stages `seconds` by the clock and `peak_bytes`, the process's largest memory.
    """
    if tokens < 4 * SMALL:
        raise UsageError(f"too little is measured in {tokens} tokens: raise --tokens to {4 * SMALL} or more")
    return {kind: _measure(config, kind, tokens, emit) for kind in REFERENCES}


def _measure(config: Config, kind: str, tokens: int, emit: Emit) -> dict[str, Json]:
    with tempfile.TemporaryDirectory() as name:
        folder, spent, found = Path(name), Counter[str](), dict[str, Json]()
        configs = _alone(_make_corpora, config, kind, (SMALL, tokens), folder)
        metrics: Json = {}
        for done, stage in enumerate(STAGES, 1):
            metrics, spent[stage], found[stage] = _alone(_run, stage, *configs, folder)
            emit("progress", done=done, total=len(STAGES), unit=f"stages, {kind}")
        spent["end to end"] = sum(spent[stage] for stage in WHOLE)
        spent += _alone(_references, kind, configs[-1], folder)
    count = metrics["train_tokens"] + metrics["val_tokens"] + metrics["dropped_tokens"]
    speeds = {name: count / seconds for name, seconds in spent.items()}
    for name, speed in speeds.items():
        found[name] = {"tokens_per_second_per_core": speed, **found.get(name, {})}
        if reference := REFERENCES[kind].get(name):
            found[name] |= {"reference": reference, "of_reference": speed / speeds[reference]}
    return found


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _make_corpora(config: Config, kind: str, sizes: tuple[int, ...], folder: Path) -> list[Config]:
    """Write files of random ids, or of paragraphs of the built-in corpus in any order; return what prepares each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = config.data.tokenizer if kind == "text" or config.data.tokenizer == "bytes" else "gpt2"
    data = {"revision": "", "column": kind, "pretokenized": kind == "ids", "tokenizer": tokenizer, "val_tokens": None}
    configs = []
    for tokens in sizes:
        batches = _texts(tokens) if kind == "text" else _ids(tokens, 256 if tokenizer == "bytes" else 50_257)
        first, path = next(batches), folder / f"{tokens}.parquet"
        with pq.ParquetWriter(path, pa.schema([(kind, first.type)])) as writer:
            for batch in (first, *batches):
                writer.write_table(pa.table({kind: batch}))
        configs.append(config.replace(data={**data, "source": (str(path),)}))
    return configs


def _ids(tokens: int, n_vocab: int) -> Iterator[Any]:
    import pyarrow as pa

    rng = np.random.default_rng(0)
    for start in range(0, tokens, ROW * ROWS):
        rows = min(ROWS, -(-(tokens - start) // ROW))
        values = rng.integers(0, n_vocab, rows * ROW, np.uint16)
        yield pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * ROW), pa.array(values))


def _texts(tokens: int) -> Iterator[Any]:
    import fsspec
    import pyarrow as pa

    from nanodlm.data.sources import source_files

    paragraphs: list[str] = []
    for opened in fsspec.open_files(source_files(DataConfig()), "rt", encoding="utf-8"):
        with opened as speech:
            paragraphs += speech.read().split("\n\n")
    rng, left = np.random.default_rng(0), 4 * tokens  # bytes, of which a token has about four
    while left > 0:
        texts = []
        while len(texts) < ROWS and left > 0:
            texts.append("\n\n".join(paragraphs[i] for i in rng.integers(0, len(paragraphs), 8)))
            left -= len(texts[-1])
        yield pa.array(texts, pa.large_string())


def _run(stage: str, small: Config, large: Config, folder: Path) -> tuple[Json, float, Json]:
    """Run a stage on both corpora; return of the large one its metrics, its CPU time, and what else was measured."""
    os.environ["NANODLM_CACHE"] = str(folder / "cache")  # which remembers sources
    store = Store(str(folder / "store"))
    run_stage(stage, small, store)
    began, cpu_began = time.perf_counter(), time.process_time()
    artifact, _ = run_stage(stage, large, store)
    cpu, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return artifact.metrics, cpu, {"seconds": seconds, "peak_bytes": peak}


def _references(kind: str, config: Config, folder: Path) -> Counter[str]:
    """Return the seconds of CPU time that libraries alone take for the corpus."""
    import pyarrow.parquet as pq

    from nanodlm.data import rows
    from nanodlm.data.tokenizer import load

    spent = Counter[str]()

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        spent[name] += time.process_time() - began

    encoding = load(run_stage("tokenizer", config, Store(str(folder / "store")))[0].local())
    batches = pq.ParquetFile(config.data.source[0]).iter_batches(ROWS)
    while True:
        with clock("parquet read"):
            batch = next(batches, None)
        if batch is None:
            return spent
        if kind == "ids":
            ids = batch.column(0).flatten().to_numpy().reshape(-1, ROW)
            with clock("blake2b"):
                for row in ids:
                    hashlib.blake2b(row, digest_size=16).digest()
            with clock("ArrayRecord write"):
                rows.write(folder / "rows", ids)
        else:
            texts = batch.column(0).to_pylist()
            with clock("encode_ordinary_batch"):
                encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
