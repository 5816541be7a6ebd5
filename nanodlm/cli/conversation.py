"""Writing with a model on a terminal: each line is a prompt, and settings change between them."""

import contextlib
import readline
import textwrap

from rich.markup import escape

from nanodlm.cli.console import Console
from nanodlm.config import TextRequest, explain
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.generation.texts import GAP, Writer
from nanodlm.store.cache import cache_dir

SHORT = {"steps": "num_steps"}
HELP = """a line is a prompt; [MASK:6] in it is a gap to fill; an empty one is none
/temperature 0.7, /sampler entropy, /steps 32, /length 200  change a setting
/watch  lets texts appear out of masks, or prints them
/help   says this and the settings; /quit or Ctrl-D ends, Ctrl-C stops a text"""


class Conversation:
    """A terminal session with a loaded model; each text has the next seed, so that a line written again is drawn anew.

    >>> Conversation.names("/te")
    ['/temperature']
    """

    def __init__(self, writer: Writer, request: TextRequest, console: Console):
        self.writer, self.request, self.console, self.watched = writer, request, console, True

    @staticmethod
    def names(begin: str = "/") -> list[str]:
        """Return the commands that begin so."""
        settings = [name for name in TextRequest.model_fields if name not in ("prompt", "infill")]
        return [f"/{name}" for name in (*settings, *SHORT, "watch", "help", "quit") if f"/{name}".startswith(begin)]

    def go_on(self) -> None:
        """Read lines and answer them, until the end of input."""
        history = cache_dir() / "history"
        with contextlib.suppress(OSError):
            readline.read_history_file(history)
        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, i: [*self.names(text), None][i] if text.startswith("/") else None)
        readline.parse_and_bind("tab: complete")
        self.console.line(f"[dim]{HELP}[/dim]")
        try:
            while self._answered():
                pass
        finally:
            with contextlib.suppress(OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                readline.set_history_length(1000)
                readline.write_history_file(history)

    def _answered(self) -> bool:
        """Read one line and answer it; at the end of input, say so."""
        try:
            line = input("> ")
            if line.strip() == "/quit":
                return False
            if line.startswith("/"):
                self._set(line[1:])
            else:
                self._write(line)
        except EOFError:
            self.console.line("")
            return False
        except KeyboardInterrupt:
            self.console.line("\n[dim]stopped[/dim]")
        except Exception as error:  # whatever it is, the next line may do better
            known = isinstance(error, (NanodlmError, ValueError))
            said = explain(error) if known else f"{type(error).__name__}: {explain(error)[:500]}"
            self.console.line(f"[red]{escape(said)}[/red]")
        return True

    def _set(self, line: str) -> None:
        name, _, value = line.strip().partition(" ")
        name = SHORT.get(name, name)
        if value and name in ("watch", "help", "quit"):
            raise UsageError(f"/{name} takes nothing after it")
        if name == "watch":
            self.watched = not self.watched
            self.console.line(f"[dim]texts {'appear out of masks' if self.watched else 'are printed'}[/dim]")
        elif name == "help":
            options = {**self.request.model_dump(), **self.writer.options(self.request).model_dump()}
            settings = [f"{name} {options[name[1:]]}" for name in self.names() if name[1:] in options]
            self.console.line(f"[dim]{HELP}\n{escape(textwrap.fill(', '.join(settings), 79))}[/dim]")
        elif f"/{name}" in self.names():
            request = TextRequest.model_validate({**self.request.model_dump(), name: value.strip() or None})
            self.writer.options(request)
            self.request = request
        else:
            raise UsageError(f"unknown command /{name}: /help lists them")

    def _write(self, line: str) -> None:
        asked = {"infill": line, "prompt": ""} if GAP.search(line) else {"prompt": line, "infill": ""}
        request = self.request.model_copy(update=asked)
        with self.console.showing("") as emit:
            written = list(self.writer.write([request], recorded=self.watched, emit=emit))
        for number, text in enumerate(written):
            self.console.written(text, watch=self.watched, first=number == 0)
        self.console.line(f"[dim]seed {request.seed}, {written[-1].calls} calls of the network[/dim]")
        self.request = self.request.model_copy(update={"seed": request.seed + 1})
