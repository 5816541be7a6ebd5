"""What Prefect's pages show: log lines of a stage, and the report of a run."""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from nanodlm.errors import Stopped
from nanodlm.evaluation import figures
from nanodlm.evaluation.artifacts import logs_of
from nanodlm.stages.progress import Pace, Watcher, summary
from nanodlm.store import Artifact

SECONDS = 30.0  # between two lines of a stage's progress in Prefect's log


class RunLog:
    """Shows one stage in Prefect's log, its progress in a line each 30 s."""

    def __init__(self) -> None:
        self._logger, self._pace = get_run_logger(), Pace()

    def showing(self, stage: str) -> AbstractContextManager[Any]:
        """Say that a stage is about to be built."""
        self._logger.info("%s: building", stage)
        return nullcontext()

    def emit(self, kind: str, **fields: Any) -> None:
        """Show an event of the running stage: `message` (text) or `progress` (done, total, unit, ...)."""
        if kind == "message":
            self._logger.info(fields["text"])
        elif kind == "progress":
            text = self._pace.describe(fields)
            if self._pace.due(SECONDS):
                self._logger.info(text)

    def done(self, artifact: Artifact, record: dict[str, Any]) -> None:
        """Say what a finished stage holds."""
        told = f"{summary(artifact)} in {record['seconds']:,.1f} s"
        self._logger.info("%s: %s, %s, %s", record["stage"], record["status"], told, record["uri"])


WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)  # of this run; by default its log


def show_run(artifacts: dict[str, Artifact]) -> None:
    """Show all of a run in one place, under the key `report`; a server that does not take it fails no run."""
    store, lines = next(iter(artifacts.values())).store, []
    if "train" in artifacts:
        logs, unigram = logs_of(artifacts["train"]), artifacts["shard"].metrics.get("val_unigram_nats_per_token")
        if picture := figures.curve({"the bound": logs}, unigram=unigram):
            lines.append(f"![loss curve]({figures.as_url(picture)})")
    if report := artifacts.get("report"):
        where = f"{'file://' * store.is_local}{store.address(report.remote('report.html'))}"
        lines += [f"The page with all figures:\n\n    {where}", report.file("report.md").read_text()]
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            page = "\n\n".join([*lines, f"Store: `{store.uri()}`"])
            create_markdown_artifact(page, key="report", description=store.uri())
    except Stopped:
        raise
    except Exception as error:  # whatever the server, the network or the client make of it
        get_run_logger().warning("the report is not shown on Prefect's pages: %s", type(error).__name__)
