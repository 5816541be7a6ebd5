"""What Prefect's pages show of a stage: log lines, progress, counts, the loss curve, samples, the report.

A page that cannot be written, because the server is away, is said in the log and never fails a stage.
"""

import base64
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from prefect import artifacts as pages
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from nanodlm.evaluation.report import loss_curve, texts_of
from nanodlm.stages.progress import Pace, summary
from nanodlm.stages.table import NAMES
from nanodlm.store import Artifact

SECONDS = 30.0  # between two lines of a stage's progress in Prefect's log, and on its page


class Watcher(Protocol):
    """Whoever shows the stages to a person; `nanodlm.cli.console.Console` is one, `Pages` another."""

    def showing(self, stage: str) -> AbstractContextManager[Any]: ...
    def emit(self, kind: str, **fields: Any) -> None: ...
    def done(self, artifact: Artifact, record: dict[str, Any]) -> None: ...


class Pages:
    """Shows one stage in Prefect's log, at most a line each 30 s, and as artifacts of its task run."""

    def __init__(self) -> None:
        self._logger, self._last, self._pace = get_run_logger(), 0.0, Pace()
        self._stage, self._progress = "", None

    def showing(self, stage: str) -> AbstractContextManager[Any]:
        """Say that a stage is about to be built."""
        self._stage = stage
        self._logger.info("%s: building", stage)
        return nullcontext()

    def emit(self, kind: str, **fields: Any) -> None:
        """Show an event of the running stage: `message` (text) or `progress` (done, total, unit, ...)."""
        if kind == "message":
            self._logger.info(fields["text"])
        elif kind == "progress":
            text = self._pace.describe(fields)
            if time.monotonic() - self._last >= SECONDS:
                self._last = time.monotonic()
                self._logger.info(text)
                self._show_progress(100.0 * fields["done"] / fields["total"] if fields.get("total") else 0.0, text)

    def done(self, artifact: Artifact, record: dict[str, Any]) -> None:
        """Show what a finished stage holds."""
        self._logger.info("%(stage)s: %(status)s in %(seconds)s s, %(uri)s", record)
        if self._progress is not None:
            self._show_progress(100.0, f"{summary(artifact)} in {record['seconds']:,.0f} s")
        if show := SHOWN.get(artifact.stage):
            self._write(show, artifact)

    def _show_progress(self, percent: float, text: str) -> None:
        if self._progress is None:
            key = f"{self._stage}-progress"
            self._progress = self._write(pages.create_progress_artifact, percent, key=key, description=text)
        else:
            self._write(pages.update_progress_artifact, self._progress, percent, description=text)

    def _write(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                return call(*arguments, **options)
        except Exception as error:  # whatever the server, the network or the client make of it
            self._logger.warning("not shown on Prefect's pages: %s", type(error).__name__)


WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)  # of this run; by default its pages


def show_counts(shard: Artifact) -> None:
    """Show a table of what the data stages counted, under the key `data-counts`."""
    made_from, counts = shard.manifest["inputs"], shard.metrics
    inputs = [shard.store.find(name, made_from[name]["fingerprint"]) for name in NAMES if name in made_from]
    rows = [
        {"stage": a.stage, "holds": summary(a), "fingerprint": a.fingerprint[:16], "at": a.uri}
        for a in filter(None, [*inputs, shard])
    ]
    for name, side in (("train", "train"), ("validation", "val")):
        rows.append({"stage": name, "holds": f"{counts[f'{side}_tokens']:,} tokens in {counts[f'{side}_rows']:,} rows"})
    pages.create_table_artifact(rows, key="data-counts", description="What the model is trained and tested on")


def show_loss(train: Artifact) -> None:
    """Show the training bound over the updates, a picture under the key `loss-curve`."""
    logs = json.loads(train.file("logs.json").read_text())
    points = [(record["step"], record["nats_per_token"]) for record in logs if record["nats_per_token"] is not None]
    if points:
        size = '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="290" '
        picture = base64.b64encode(loss_curve(points).replace("<svg ", size).encode()).decode()
        url, said = f"data:image/svg+xml;base64,{picture}", f"Training bound: {summary(train)}"
        pages.create_image_artifact(image_url=url, key="loss-curve", description=said)


def show_samples(sample: Artifact) -> None:
    """Show the texts that the model wrote, under the key `samples`."""
    texts = texts_of(sample)
    quoted = ["\n".join(f"    {line}" for line in text.splitlines()) for text in texts]  # as code: no markup of theirs
    pages.create_markdown_artifact("\n\n---\n\n".join(quoted), key="samples", description=f"{len(texts)} samples")


def show_report(report: Artifact) -> None:
    """Show the report's numbers under the key `report`, and a link to its page under `report-page`."""
    pages.create_markdown_artifact(report.file("report.md").read_text(), key="report", description=report.uri)
    page = report.remote("report.html")
    link = Path(page).as_uri() if report.store.is_local else report.store.fs.unstrip_protocol(page)
    pages.create_link_artifact(link, link_text="report.html", key="report-page", description=report.uri)


SHOWN = {"shard": show_counts, "train": show_loss, "sample": show_samples, "report": show_report}
