"""The command that writes texts with a trained model."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.cli.arguments import Output
from nanodlm.cli.console import Console
from nanodlm.cli.files import check_file, writing
from nanodlm.cli.models import Model, choose, short
from nanodlm.cli.store import OpenStore
from nanodlm.config import TextRequest
from nanodlm.errors import Stopped, UsageError, counted

Prompts = Annotated[str, Doc("File of prompts: one a line, or .jsonl with a field `prompt`."), arg(metavar="FILE")]
Lines = Annotated[str, Doc("File for the texts, as JSON lines."), arg(metavar="FILE.jsonl")]
Watch = Annotated[bool, Doc("Let each text appear out of masks, in a terminal.")]
Gif = Annotated[str, Doc("Draw the steps of the first text as an animated GIF."), arg(metavar="FILE")]
Html = Annotated[str, Doc("Write a page with a slider through the steps of the texts."), arg(metavar="FILE")]


def generate(
    model: Model = "",
    /,
    how: Annotated[TextRequest, arg(name="")] = TextRequest(),  # noqa: B008  # frozen
    *,
    prompts: Prompts = "",
    watch: Watch = False,
    gif: Gif = "",
    html: Html = "",
    out: Lines = "",
    store: OpenStore,
    console: Output,
) -> None:
    """Write texts with a trained model, or, without a prompt, talk with it."""
    for file in (out, gif, html):
        check_file(file)
    if prompts and (how.prompt or how.infill):
        raise UsageError("--prompts says with what texts begin: leave --prompt and --infill out")
    requests = [how.model_copy(update={"prompt": prompt}) for prompt in read_prompts(prompts)] if prompts else [how]
    for request in requests:
        try:
            f"{request.prompt}{request.infill}".encode()
        except UnicodeEncodeError as error:
            raise UsageError("a prompt is not UTF-8") from error
    with _in_one_line_when_interrupted():
        from nanodlm.checkpoints.loading import load
        from nanodlm.cli.conversation import Conversation
        from nanodlm.generation import slider
        from nanodlm.generation.texts import Writer
        from nanodlm.generation.watch import gif as draw_gif

        address = choose(model, store)
        writer = Writer(*load(address))
        alone = not (prompts or how.prompt or how.infill or out or gif or html or console.is_json)
        if alone and sys.stdin.isatty() and sys.stdout.isatty():
            Conversation(writer, how, console).go_on()
            return
        with Console(sys.stderr).showing("generate") as emit:
            written = list(writer.write(requests, recorded=bool(watch or gif or html), emit=emit))
        lines = []
        for number, text in enumerate(written):
            console.written(text, watch=watch, first=number == 0)
            begin = {"prompt": requests[number // how.num].prompt} if prompts else {}
            bound = {} if text.nats_per_token is None else {"nats_per_token": text.nats_per_token}
            lines.append(json.dumps({**begin, "text": text.text, **bound}) + "\n")
        recordings = [text.recording for text in written if text.recording]
        if gif:
            with writing(gif):
                draw_gif(recordings[0], Path(gif))
        steps = counted(recordings[0].total if recordings else 0, "steps")
        title = f"{short(address)}: {writer.options(how).sampler}, {steps}, seed {how.seed}"
        for file, content in ((html, html and slider.page(recordings, title)), (out, "".join(lines))):
            if file:
                with writing(file):
                    Path(file).write_text(content)
        console.json(model=address, texts=[text.text for text in written], calls=written[-1].calls)


@contextlib.contextmanager
def _in_one_line_when_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped("interrupted before all texts were written") from error


def read_prompts(file: str) -> list[str]:
    """Return the prompts in a file."""
    try:
        lines = Path(file).read_bytes().decode().split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt = _field(line) if file.endswith(".jsonl") else line.removesuffix("\r")
        if not isinstance(prompt, str):
            raise UsageError(f"line {number} of {file} is no JSON object with a text as its `prompt`")
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{file} holds no prompts")
    return prompts


def _field(line: str) -> Any:
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        return None
