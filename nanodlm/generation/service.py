"""The page of one model, and completions for scripts: an application that answers on loopback.

    GET  /                  the page
    GET  /api/model         the model's name and kind, and the options of its sampler
    GET  /api/tokens        how many tokens a text has
    GET  /v1/models         the model, as clients of language models look for it
    GET  /api/text          a text as it is written: server-sent events `queued`, `start`, `step`, `done` or `failed`
    POST /v1/completions    see `completions`

One text is written at a time, the others wait in a queue. Inputs and times are bounded, pages of other sites are
refused, and whoever leaves stops their text after its present step.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any, get_args

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nanodlm.config import SamplerConfig, TextRequest
from nanodlm.data.tokenizer import encode
from nanodlm.errors import NanodlmError, UsageError, redact
from nanodlm.generation.completions import Answer, Completions
from nanodlm.generation.texts import Asked, Frame, Writer
from nanodlm.generation.turns import MOST_CHARACTERS, Turns, frames_of, rows_of
from nanodlm.generation.watch import pieces
from nanodlm.model.transformer import count_parameters

PAGES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {  # nothing in a text can run, and no other site can show the page
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(writer: Writer, name: str) -> FastAPI:
    """Return the application of a model of this name."""
    app, turns = FastAPI(title="nanodlm", docs_url=None, redoc_url=None, openapi_url=None), Turns()
    app.state.turns, since = turns, int(time.time())
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.middleware("http")
    async def guarded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _failure("pages of other sites are not answered", 403)
        response = await answer(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place, said = ".".join(map(str, first["loc"][1:])), first["msg"].removeprefix("Value error, ")
        return _failure(f"{place}: {said}" if place else said)

    @app.exception_handler(HTTPException)
    async def absent(_: Request, error: HTTPException) -> Response:
        return _failure(error.detail, error.status_code)

    @app.exception_handler(NanodlmError)
    async def refused(_: Request, error: NanodlmError) -> Response:
        return _failure(str(error), getattr(error, "status", 400 if isinstance(error, UsageError) else 500))

    for path, file in PAGES.items():
        app.get(path)(_page(file))

    @app.get("/api/model")
    def model() -> dict[str, Any]:
        kind, count = writer.network.objective.kind, count_parameters(writer.network)
        return {"name": name, "kind": kind, "parameters": count, "options": options_of(writer)}

    @app.get("/api/tokens")
    def tokens(text: Annotated[str, Query(max_length=MOST_CHARACTERS)]) -> dict[str, int]:
        return {"tokens": sum(map(len, encode(writer.encoding, text)))}

    @app.get("/api/text")
    async def text(asked: Annotated[TextRequest, Query()]) -> Response:
        rows = await asyncio.to_thread(rows_of, writer, [asked])
        return stream(watched(writer, rows, turns, turns.ahead))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": since, "owned_by": "nanodlm"}]}

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: Completions, request: Request) -> Response | dict[str, Any]:
        answer = await asyncio.to_thread(Answer, writer, name, asked)
        if asked.stream:
            return stream(answer.parts(turns))
        return await turns.unless_left(request, answer.whole(turns))

    def stream(events: AsyncGenerator[str, None]) -> Response:
        return StreamingResponse(turns.stream(events), media_type="text/event-stream")

    return app


def _page(file: str) -> Callable[[], Response]:
    content = files("nanodlm.generation").joinpath("page", file).read_text()
    return lambda: Response(content, media_type=TYPES[file.rpartition(".")[2]])


def _failure(message: str, status: int = 400) -> Response:
    return JSONResponse({"error": {"message": redact(message), "type": "invalid_request_error"}}, status)


def options_of(writer: Writer) -> list[dict[str, Any]]:
    """Return the options of the model's samplers for a form: their names, what they are, and their usual values."""
    usual, offered = writer.options(TextRequest()).model_dump(), []
    choices = {"sampler": writer.traits.samplers, "grid": get_args(SamplerConfig.model_fields["grid"].annotation)}
    for name, field in TextRequest.model_fields.items():
        if name in ("prompt", "infill", "num", "seed") or (name == "guidance" and not writer.traits.guidance):
            continue
        value, about = usual.get(name), " ".join((field.description or "").split())
        option = {"name": name, "about": about, "value": value, "choices": choices.get(name)}
        offered.append({**option, "whole": name == "length" or isinstance(value, int)})
    return offered


async def watched(writer: Writer, asked: Asked, turns: Turns, ahead: int) -> AsyncGenerator[str, None]:
    """Yield the events of a text as it is written; of one with gaps of any length, when the best is known."""
    yield _event("queued", ahead=ahead)
    try:
        async with turns.one():
            began, row, end, frames = time.monotonic(), 0, asked.ends[0], frames_of(writer, asked, 0, turns)
            if asked.tried:
                row, end, frames = await _best(writer, asked, turns)
            before, frame, step = None, None, -1
            async for frame in frames:
                step += 1
                tokens, confidence = frame.tokens[row, :end], frame.confidence[row, :end]
                now = pieces(writer.encoding, tokens.tolist())
                if before is None:
                    yield _event("start", tokens=now)
                elif now != before:
                    news = [(i, new, round(float(confidence[i]), 3)) for i, new in enumerate(now) if new != before[i]]
                    yield _event("step", number=step, changed=news)
                before = now
            if frame is not None:
                text = writer.encoding.decode(writer.shown(frame.tokens[row, :end]))
                of = {"steps": step, "calls": frame.calls, "seed": asked.request.seed}
                yield _event("done", text=text, seconds=round(time.monotonic() - began, 2), **of)
    except NanodlmError as error:
        yield _event("failed", message=redact(str(error)))


def _event(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _best(writer: Writer, asked: Asked, turns: Turns) -> tuple[int, int, AsyncIterator[Frame]]:
    """Return the row and the length of the text with the best bound, and the frames of its batch."""
    found = [[frame async for frame in frames_of(writer, asked, batch, turns)] for batch in range(asked.batches)]
    tokens = np.concatenate([frames[-1].tokens for frames in found])
    texts = [tokens[i, :end].tolist() for i, end in enumerate(asked.ends)]
    best = int(np.argmin(await asyncio.to_thread(writer.ranked, texts)))
    batch = next(i for i in range(asked.batches) if best < asked.of_batch(i).stop)

    async def again() -> AsyncIterator[Frame]:
        for frame in found[batch]:
            yield frame

    return best - asked.of_batch(batch).start, asked.ends[best], again()
