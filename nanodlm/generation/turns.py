"""One text at a time for many who ask: the queue, and the limits of what may be asked."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from nanodlm.config import TextRequest
from nanodlm.errors import NanodlmError
from nanodlm.generation.texts import GAP, Asked, Frame, Writer

T = TypeVar("T")
WAITING = 8  # texts that may wait for their turn
UNREAD, PATIENCE = 512, 10  # events of a text that wait for their reader, and seconds that it then has for the next
SECONDS = 300  # that a text may take once it is its turn
MOST_TEXTS, MOST_CHARACTERS, MOST_STEPS = 16, 20_000, 4096  # of one request
MOST_ROWS = 8  # of the model, that a text may be long


class Refused(NanodlmError):
    """A request that is not answered, with the status of HTTP that says so."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Turns:
    """One text at a time, while others wait."""

    def __init__(self) -> None:
        self._lock, self.ahead = asyncio.Lock(), 0  # texts that come before a new one
        self.ended = False  # whether the server ends, and texts with it

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold the turn, from when it comes."""
        async with self._lock:
            yield

    def begin(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Return a task of what waits for its turn, which counts from now on; behind too many, it is `Refused`."""
        if self.ahead > WAITING:
            work.close()
            raise Refused(f"{WAITING} texts are waiting already: try again in a minute", 429)
        self.ahead += 1
        task = asyncio.create_task(work)
        task.add_done_callback(self._left)
        return task

    def _left(self, _: "asyncio.Task[Any]") -> None:
        self.ahead -= 1

    def stream(self, events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
        """Return events that are made before they are read, `UNREAD` at most; where none then is, the text ends."""
        queue, room = asyncio.Queue[str | None](), asyncio.Semaphore(UNREAD)

        async def fill() -> None:
            try:
                async with aclosing(events):
                    async for event in events:
                        await asyncio.wait_for(room.acquire(), PATIENCE)
                        queue.put_nowait(event)
            except TimeoutError:  # nobody reads, and so nobody is told
                pass
            finally:
                queue.put_nowait(None)

        task = self.begin(fill())

        async def read() -> AsyncIterator[str]:
            try:
                while (event := await queue.get()) is not None:
                    room.release()
                    yield event
                await task
            finally:
                task.cancel()

        return read()

    async def unless_left(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work gives; when whoever asked has left, it stops."""

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        task, leaving = self.begin(work), asyncio.create_task(left())
        try:
            await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Refused("whoever asked has left", 499)
            return task.result()
        finally:
            task.cancel()
            leaving.cancel()


def bounded(asked: TextRequest, row: int) -> TextRequest:
    """Return a request for texts of a model with rows of so many tokens, if it is not for too much."""
    limits = {"num": MOST_TEXTS, "num_steps": MOST_STEPS, "length": MOST_ROWS * row}
    limits |= dict.fromkeys(("prompt", "infill"), MOST_CHARACTERS)
    for name, most in limits.items():
        value = getattr(asked, name)
        value = len(value) if isinstance(value, str) else value
        if value is not None and value > most:
            raise Refused(f"{name} is {value:,}, and here {most:,} at most")
    return asked


def rows_of(writer: Writer, requests: Sequence[TextRequest]) -> Asked:
    """Return the rows for requests, see `Writer.asked`; it may take a while, so that it has a place in a thread."""
    most = MOST_ROWS * writer.network.seq_len
    for request in requests:
        gaps = sum(int(size or 0) for size in GAP.findall(bounded(request, writer.network.seq_len).infill))
        if gaps > most:
            raise Refused(f"the gaps have {gaps:,} tokens, and here {most:,} at most")
    asked = writer.asked(requests)
    if asked.rows.shape[1] > most:
        raise Refused(f"the text has {asked.rows.shape[1]:,} tokens, and here {most:,} at most")
    return asked


async def frames_of(writer: Writer, asked: Asked, batch: int, turns: Turns) -> AsyncIterator[Frame]:
    """Yield the frames of a batch, each made in a thread; one that takes too long is `Refused`."""
    frames, end = writer.frames(asked, batch), time.monotonic() + SECONDS
    while not turns.ended and (frame := await asyncio.to_thread(next, frames, None)) is not None:
        yield frame
        if time.monotonic() > end:
            raise Refused(f"it took longer than {SECONDS} s: ask for fewer steps, or a shorter text", 504)
    if turns.ended:
        raise Refused("the server ends", 503)
