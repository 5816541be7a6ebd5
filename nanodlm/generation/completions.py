"""Completions: texts in the shape that clients of language models know, whole or as a stream.

A text that is streamed is sent from its beginning on, as far as no later step changes it: up to the first mask, or,
with a sampler that draws tokens again, at the end alone.
"""

import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanodlm.config import TextRequest, explain
from nanodlm.data.tokenizer import encode
from nanodlm.errors import NanodlmError, redact
from nanodlm.generation.texts import Asked, Frame, Writer
from nanodlm.generation.turns import MOST_CHARACTERS, MOST_TEXTS, Refused, Turns, frames_of, rows_of

Prompt = Annotated[str, Field(max_length=MOST_CHARACTERS)]


class Completions(BaseModel):
    """What is asked for; options of the model's sampler may stand beside these."""

    model_config = ConfigDict(extra="allow")
    model: str = ""
    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_TEXTS)] = ""
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=MOST_TEXTS)
    stop: str | list[str] | None = None
    stream: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)


@dataclass
class Answer:
    """The answer to a request, by a model of this name; what makes no sense is `Refused` before any text is written."""

    writer: Writer
    name: str
    asked: Completions
    rows: Asked = field(init=False)
    given: list[int] = field(init=False)  # tokens of each row that are the prompt's

    def __post_init__(self) -> None:
        asked, row = self.asked, self.writer.network.seq_len
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        given = [sum(map(len, encode(self.writer.encoding, prompt))) for prompt in prompts for _ in range(asked.n)]
        if len(given) > MOST_TEXTS:
            raise Refused(f"{len(given)} texts are asked for, and here {MOST_TEXTS} at most")
        new = asked.max_tokens or max(16, row - max(given))
        options = {"num": asked.n, "seed": asked.seed, "length": max(max(given) + new, 2)}
        options |= {k: v for k, v in (asked.model_extra or {}).items() if k in TextRequest.model_fields}
        try:
            requests = [TextRequest(**{**options, "prompt": prompt}) for prompt in prompts]
        except ValidationError as error:
            raise Refused(explain(error)) from error
        self.rows, self.given = replace(rows_of(self.writer, requests), ends=[count + new for count in given]), given
        self._head = {"id": f"cmpl-{time.time_ns():x}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = self.name
        self._stops = [stop for stop in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or []) if stop]

    async def whole(self, turns: Turns) -> dict[str, Any]:
        """Return all texts, and how many tokens they have."""
        choices = []
        async with turns.one():
            for batch in range(self.rows.batches):
                frames = [frame async for frame in frames_of(self.writer, self.rows, batch)]
                choices += self._choices(frames[-1], batch)
        counts = {"prompt_tokens": sum(self.given), "completion_tokens": sum(self.rows.ends) - sum(self.given)}
        return {**self._head, "choices": choices, "usage": {**counts, "total_tokens": sum(self.rows.ends)}}

    async def parts(self, turns: Turns) -> AsyncIterator[str]:
        """Yield the texts as server-sent events, each a piece of one of them."""
        held = max(map(len, self._stops), default=1) - 1  # characters at the end that may begin a stop
        try:
            async with turns.one():
                for batch in range(self.rows.batches):
                    said, frame = [0] * len(self.given), None
                    async for frame in frames_of(self.writer, self.rows, batch):
                        for i, choice in enumerate(self._choices(frame, batch, settled=True) if self._settles else ()):
                            text = choice["text"].rstrip("\ufffd")  # which may be the beginning of a character
                            text = text if choice["finish_reason"] == "stop" else text[: max(0, len(text) - held)]
                            if len(text) > said[i]:
                                yield self._data({**choice, "text": text[said[i] :], "finish_reason": None})
                                said[i] = len(text)
                    for i, choice in enumerate(self._choices(frame, batch) if frame else ()):
                        yield self._data({**choice, "text": choice["text"][said[i] :]})
        except NanodlmError as error:
            yield f"data: {json.dumps({'error': {'message': redact(str(error)), 'type': 'server_error'}})}\n\n"
        yield "data: [DONE]\n\n"

    def _data(self, choice: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self._head, 'choices': [choice]})}\n\n"

    @property
    def _settles(self) -> bool:
        """Whether a token that was decided stays."""
        traits, sampler = self.writer.traits, self.writer.options(self.rows.request).sampler
        return not traits.random_tokens and not sampler.startswith("remdm")

    def _choices(self, frame: Frame, batch: int, settled: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the choices of a batch as they are; with `settled`, of each no more than is before its first mask.

        A text ends with the mark of the end of text, before the first `stop`, or where it is long enough.
        """
        mark = self.writer.encoding.eot_token
        for i in range(len(self.given))[self.rows.of_batch(batch)]:
            given, end = self.given[i], self.rows.ends[i]
            row = frame.tokens[i - self.rows.of_batch(batch).start, :end]
            known = int(np.argmax([*(row == self.writer.mask_id), True])) if settled else end
            ids = row[given : max(known, given)].tolist()
            whole = ids[: [*ids, mark].index(mark)]
            text = self.writer.encoding.decode(whole)
            cut = min([text.find(stop) for stop in self._stops if stop in text], default=len(text))
            ended = "stop" if cut < len(text) or len(whole) < len(ids) else "length"
            yield {"text": text[:cut], "index": i, "finish_reason": ended, "logprobs": None}
