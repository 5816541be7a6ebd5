"""What a person sees: a line per stage, how long ones go, and where everything lies at the end."""

import json as json_module
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typing_extensions import Doc
from tyro.conf import Suppress

from nanodlm.errors import Emit
from nanodlm.stages.progress import Pace, summary

if TYPE_CHECKING:
    from nanodlm.generation.texts import Written
    from nanodlm.store import Artifact

Json = Annotated[bool, Doc("Print one JSON object as the last line of standard output.")]
PLAIN_SECONDS = 10.0  # between progress lines when the output is not a terminal


class Console:
    """Show events of stages as they come; `emit` has the signature that stages call."""

    def __init__(self, stream: Suppress[TextIO | None] = None, *, json: Json = False):
        """Show events on a stream, and print results, or with `json` one JSON object, on standard output."""
        shown = stream or (sys.stderr if json else sys.stdout)
        self._rich, self.is_json = RichConsole(file=shown, highlight=False, emoji=False), json
        self._stage, self._pace = "", Pace()
        self.artifacts: dict[str, Artifact] = {}  # of finished stages, by stage
        self._records: list[dict[str, Any]] = []  # of finished stages

    def line(self, text: str, before: str = "") -> None:
        """Print a line, in which `[bold]` and the like mean what they do to rich.

        A terminal breaks it between words, and what goes on stands below the text, not below what is `before` it.
        """
        if before and self._rich.is_terminal:
            self._rich.print(_beside(before, text))
        else:
            self._rich.print(before + text, soft_wrap=not self._rich.is_terminal)

    def place(self, name: str, where: str) -> None:
        """Print where something lies, which no terminal may break, so that it can be copied."""
        self._rich.print(f"{name:<12} {escape(where)}", soft_wrap=True)

    def text(self, *lines: str) -> None:
        """Print lines of a result, unless it is to be JSON."""
        if lines and not self.is_json:
            print(*lines, sep="\n")

    def prose(self, text: str, before: str = "") -> None:
        """Print a text, which a terminal breaks as `line` does, unless the result is to be JSON."""
        if self._rich.is_terminal and not self.is_json:
            self._rich.print(_beside(Text(before), Text(text)) if before else Text(text))
        else:
            self.text(f"{before}{text}".rstrip() if before else text)

    def json(self, **result: Any) -> None:
        """Print a result as one line of JSON, if that is asked for."""
        if self.is_json:
            print(json_module.dumps(result, sort_keys=True))

    @contextmanager
    def showing(self, stage: str) -> Iterator[Emit]:
        """Show a stage while it runs, with a line that changes on a terminal; this gives what to call with events."""
        self._stage, self._pace = stage, Pace()
        with self._rich.status(f"[bold]{stage:<10}") as self._status:
            yield self.emit

    def emit(self, kind: str, **fields: Any) -> None:
        """Show an event of the running stage: `message` (text) or `progress` (done, total, unit, …)."""
        if kind == "message":
            self.line(f"[dim]{escape(fields['text'])}[/dim]", f"[dim]{self._stage:<10}[/dim] ")
        elif kind == "progress":
            text = self._pace.describe(fields)
            if self._rich.is_terminal:
                self._status.update(f"[bold]{self._stage:<10}[/bold] {escape(text)}")
            elif self._pace.due(PLAIN_SECONDS):
                self.line(f"{self._stage:<10} {escape(text)}")

    def done(self, artifact: "Artifact", record: dict[str, Any]) -> None:
        """Print the line of a finished stage, and which of the files that made it have changed since."""
        from nanodlm.provenance import changed_since, remark

        if record["stage"] == artifact.stage:  # not what is as another of this run's, such as a judge
            self.artifacts[artifact.stage] = artifact
        self._records.append(record)
        built = record["status"] == "built"
        status = f"[green]built  {record['seconds']:7.1f} s[/green]" if built else f"[cyan]{'cached':<16}[/cyan]"
        self.line(escape(summary(artifact)), f"[bold]{record['stage']:<10}[/bold] {status}  ")
        if changed := changed_since(artifact):
            self.line(f"[yellow]{remark(changed)}: --rebuild changed builds it again[/yellow]", f"{'':<28}")

    def written(self, text: "Written", *, watch: bool, first: bool = True) -> None:
        """Print a text, or let it appear out of masks; what several lengths were compared by comes with it."""
        from nanodlm.data.tokenizer import END_OF_TEXT
        from nanodlm.generation.watch import play

        if watch and text.recording:
            play(text.recording, self._rich)
        else:
            self.text(*["-" * 72] * (not first))
            self.prose(text.text.replace(END_OF_TEXT, "\n\n"))
        if text.nats_per_token is not None:
            self.text(f"({text.nats_per_token:.2f} nats per token of the whole text)")

    def results(self, **more: Any) -> None:
        """Print the records and metrics of the finished stages as JSON, if that is asked for."""
        metrics = {name: value for artifact in self.artifacts.values() for name, value in artifact.metrics.items()}
        metrics.pop("first_sample", None)
        report, stages = self.artifacts.get("report"), [done for done in self._records if done["stage"] != "report"]
        self.json(stages=stages, metrics=metrics, report=report.uri if report else None, **more)

    def finish(self) -> None:
        """Print the results of the finished stages, and where everything lies; a terminal shows how a text appeared."""
        from nanodlm.evaluation.report import against_unigram, named

        self.line("")
        if "report" in self.artifacts and self._rich.is_terminal:
            from nanodlm.generation.watch import Recording, play

            first, *_ = json_module.loads(self.artifacts["sample"].file("steps.json").read_text())
            self.line("[dim]a sample:[/dim]")
            play(Recording(**first), self._rich)
            self.line("")
        elif "sample" in self.artifacts:
            text = " ".join(self.artifacts["sample"].metrics["first_sample"].split())
            self.line(f"[dim]a sample:[/dim] {escape(text)}\n")
        if "evaluate" in self.artifacts:
            m = self.artifacts["evaluate"].metrics
            bound = f"[bold]{m['val_bits_per_byte']:.3f}[/bold] ± {m['val_bits_per_byte_stderr']:.3f} bits per byte"
            unigram = f"{against_unigram(m)} the unigram entropy of {m['val_unigram_bits_per_byte']:.3f}"
            self.line(f"validation bound {bound}, {unigram}")
            for one in m.get("sets", []):
                self.line(f"{one['bits_per_byte']:.3f} bits per byte", escape(f"{named(one):<16} "))
        files, page = {"report": "report.html", "sample": "samples.txt", "train": "checkpoints"}, ""
        for artifact in reversed(self.artifacts.values()):
            link = artifact.store.show_latest(artifact) if artifact.store.is_local else None
            if file := files.get(artifact.stage):
                where = artifact.store.address(artifact.remote(file))
                if artifact.stage == "report":
                    local = Path(link / file if link else where).absolute()
                    page = local.as_uri() if artifact.store.is_local else where
                where = min(str(link / file), os.path.relpath(link / file), key=len) if link else where
                self.place(file, where)
        self.place("store", list(self.artifacts.values())[-1].store.uri())
        if page and self._rich.is_terminal:
            self.place("open", page)
        self.results()


def _beside(before: str | Text, text: str | Text) -> Table:
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True)
    grid.add_row(before, text)
    return grid
