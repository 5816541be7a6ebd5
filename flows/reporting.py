"""What Prefect's pages show of a stage: log lines, progress, counts, the loss curve, samples, the report.

A page that cannot be written, because the server is away, is said in the log and never fails a stage.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from prefect import artifacts as pages
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from nanodlm.errors import Stopped
from nanodlm.evaluation.report import logs_of, loss_curve_url, texts_of
from nanodlm.stages.progress import Pace, Watcher, counts, summary
from nanodlm.store import Artifact

SECONDS = 30.0  # between two lines of a stage's progress in Prefect's log, and on its page


class Pages:
    """Shows one stage in Prefect's log, at most a line each 30 s, and as artifacts of its task run."""

    def __init__(self) -> None:
        self._logger, self._last, self._pace = get_run_logger(), 0.0, Pace()
        self._stage, self._unigram = "", None
        self._logs: list[dict[str, Any]] = []  # of training
        self._shown: dict[str, UUID] = {}  # what is there already, by key

    def showing(self, stage: str) -> AbstractContextManager[Any]:
        """Say that a stage is about to be built."""
        self._stage = stage
        self._logger.info("%s: building", stage)
        return nullcontext()

    def emit(self, kind: str, **fields: Any) -> None:
        """Show an event of the running stage: `message` (text), `progress` (done, total, unit, ...), or `unigram`."""
        if kind == "message":
            self._logger.info(fields["text"])
        elif kind == "unigram":
            self._unigram = fields["nats_per_token"]
        elif kind == "progress":
            text = self._pace.describe(fields)
            if "nats_per_token" in fields:
                self._logs.append(fields)
            if time.monotonic() - self._last >= SECONDS:
                self._last = time.monotonic()
                self._logger.info(text)
                percent = 100.0 * fields["done"] / fields["total"] if fields.get("total") else 0.0
                self._show(f"{self._stage}-progress", pages.create_progress_artifact, percent, text)
                self._show("loss-curve", pages.create_image_artifact, loss_curve_url(self._logs, self._unigram), text)

    def done(self, artifact: Artifact, record: dict[str, Any]) -> None:
        """Show what a finished stage holds."""
        told = f"{summary(artifact)} in {record['seconds']:,.1f} s"
        self._logger.info("%s: %s, %s, %s", record["stage"], record["status"], told, record["uri"])
        if (key := f"{self._stage}-progress") in self._shown:
            self._show(key, pages.create_progress_artifact, 100.0, told)
        if artifact.stage == "train":
            self._logs = logs_of(artifact)
            self._show("loss-curve", pages.create_image_artifact, loss_curve_url(self._logs, self._unigram), told)
        if artifact.stage == "shard":
            what = "What the model is trained and tested on"
            self.write(pages.create_table_artifact, counts(artifact), key="data-counts", description=what)
        if artifact.stage == "sample":
            self.write(show_samples, artifact)

    def _show(self, key: str, create: Callable[..., Any], value: float | str, text: str) -> None:
        if key in self._shown:
            self.write(update, self._shown[key], value, text)
        elif value != "" and (made := self.write(create, value, key=key, description=text)):
            self._shown[key] = made

    def write(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call what writes a page, and return what it returns, or None when the server does not take it."""
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                return call(*arguments, **options)
        except Stopped:
            raise
        except Exception as error:  # whatever the server, the network or the client make of it
            self._logger.warning("not shown on Prefect's pages: %s", type(error).__name__)


WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)  # of this run; by default its pages


def show_samples(sample: Artifact) -> None:
    """Show the texts that the model wrote, under the key `samples`."""
    texts = texts_of(sample)
    quoted = ["\n".join(f"    {line}" for line in text.splitlines()) for text in texts]  # as code: no markup of theirs
    pages.create_markdown_artifact("\n\n---\n\n".join(quoted), key="samples", description=f"{len(texts)} samples")


def show_run(records: list[dict[str, Any]], artifacts: dict[str, Artifact]) -> None:
    """Show all of a run in one place, under the key `report`: numbers, stages, where they lie, loss curve, samples."""
    report, store = artifacts.get("report"), next(iter(artifacts.values())).store
    numbers, _, samples = (report.file("report.md").read_text() if report else "").partition("## Samples")
    lines = [numbers, "## Stages", "", "| stage | | seconds | holds |", "|---|---|---:|---|"]
    for told in records:
        holds = summary(artifacts[told["stage"]])
        lines.append(f"| {told['stage']} | {told['status']} | {told['seconds']:,.1f} | {holds} |")
    lines += ["", f"Store: `{store.uri()}`"]
    if "train" in artifacts:
        unigram = artifacts["shard"].metrics.get("val_unigram_nats_per_token")
        lines += ["", f"![loss curve]({loss_curve_url(logs_of(artifacts['train']), unigram)})"]
    if samples:
        lines += ["", "## Samples", samples]
    pages.create_markdown_artifact("\n".join(lines), key="report", description=store.uri())


def update(artifact: UUID, value: float | str, text: str) -> None:
    """Show another share that is done, or picture of the loss curve."""
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, ArtifactUpdate(data=value, description=text))
