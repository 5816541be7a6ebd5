"""One text at a time for many who ask: the queue, and the limits of what may be asked."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from nanodlm.config import TextRequest
from nanodlm.errors import NanodlmError
from nanodlm.generation.texts import GAP, Asked, Frame, Writer

WAITING = 8  # texts that may wait for their turn
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

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold the turn, from when it comes."""
        self.ahead += 1
        try:
            async with self._lock:
                yield
        finally:
            self.ahead -= 1

    def check(self) -> None:
        """Refuse what would come behind too many."""
        if self.ahead > WAITING:
            raise Refused(f"{WAITING} texts are waiting already: try again in a minute", 429)


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


async def frames_of(writer: Writer, asked: Asked, batch: int) -> AsyncIterator[Frame]:
    """Yield the frames of a batch, each made in a thread; one that takes too long is `Refused`."""
    frames, end = writer.frames(asked, batch), time.monotonic() + SECONDS
    try:
        while (frame := await asyncio.to_thread(next, frames, None)) is not None:
            yield frame
            if time.monotonic() > end:
                raise Refused(f"it took longer than {SECONDS} s: ask for fewer steps, or a shorter text", 504)
    except ValueError as error:  # of logits that are not finite
        raise Refused(str(error), 500) from error
