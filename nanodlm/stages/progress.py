"""What a running stage reports: events in a file, the pace of its progress, a line on each result."""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nanodlm.errors import Emit, counted, full_disk_named

if TYPE_CHECKING:  # what reads files is not there where only speed is measured
    from nanodlm.store import Artifact


@contextmanager
def event_log(path: Path) -> Iterator[Emit]:
    """Yield an `emit` that appends one JSON object per event to a file."""
    with full_disk_named(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def emit(kind: str, **fields: Any) -> None:
        with full_disk_named(str(path)), path.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": kind, **fields}) + "\n")

    yield emit


class Watcher(Protocol):
    """Whoever shows the stages to a person; `nanodlm.cli.console.Console` is one, the log of a flow another."""

    def showing(self, stage: str) -> AbstractContextManager[Any]: ...
    def emit(self, kind: str, **fields: Any) -> None: ...
    def done(self, artifact: "Artifact", record: dict[str, Any]) -> None: ...


class Pace:
    """Put the progress of one stage into words, with the time that is left.

    >>> Pace().describe({"done": 20, "total": 120, "unit": "updates", "bits_per_byte": 2.5})
    '20/120 updates, 2.50 bits per byte'
    """

    def __init__(self) -> None:
        self._first: tuple[float | None, float, float] | None = None  # total, done and time of a count's first event
        self._told = time.monotonic()

    def describe(self, fields: dict[str, Any]) -> str:
        """Return words for the fields of a `progress` event."""
        done, total = fields["done"], fields.get("total")
        count = "/".join(f"{n:,.1f}".removesuffix(".0") for n in (done, total) if n is not None)
        parts = [f"{count} {fields['unit']}"]
        if fields.get("bits_per_byte") is not None:
            parts.append(f"{fields['bits_per_byte']:.2f} bits per byte")
        if fields.get("tokens_per_second"):
            parts.append(f"{fields['tokens_per_second']:,.0f} tokens/s")
        now = time.monotonic()
        if self._first is None or self._first[0] != total:
            self._first = (total, done, now)
        elif total and done > self._first[1]:
            left = (total - done) * (now - self._first[2]) / (done - self._first[1])
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return ", ".join(parts)

    def due(self, seconds: float) -> bool:
        """Say if so much time has passed since the beginning, or since the last time that this was true."""
        now = time.monotonic()
        if now - self._told < seconds:
            return False
        self._told = now
        return True


SUMMARIES = {
    "download": "{counted}, {megabytes:.1f} MB",
    "tokenizer": "{n_vocab:,} entries",
    "split": "{val_tokens:,} validation tokens from {val_documents:,} of {counted}",
    "shard": "{train_rows:,} training rows of {seq_len} tokens, {val_rows:,} for validation",
    "train": "{updates:,} updates, {trained_tokens:,} tokens at {train_tokens_per_second:,.0f} tokens/s, "
    "{millions:.2f}M parameters",
    "evaluate": "{val_bits_per_byte:.4f} ± {val_bits_per_byte_stderr:.4f} bits per byte",
    "sample": "{samples} samples",
    "judge": "{gen_nats_per_token:.3f} nats per token of samples, {held_out_gen_nats_per_token:.3f} of held-out text",
    "frontier": "{points} points of {num} texts each",
    "report": "report.html, report.md",
}


def summary(artifact: "Artifact") -> str:
    """Return one phrase on what an artifact holds; nothing of one whose version did not measure that."""
    m = artifact.metrics
    inexact = {"megabytes": m.get("bytes", 0) / 1e6, "millions": m.get("parameters", 0) / 1e6}
    documents = counted(m.get("documents", 0), "documents")
    with suppress(KeyError):
        return SUMMARIES.get(artifact.stage, "").format(**m, **inexact, counted=documents)
    return ""
