"""Completions: texts in the shape that clients of language models know, whole or as a stream.

A text that is streamed is sent from its beginning on, as far as no later step changes it: up to the first mask, or,
with a sampler that draws tokens again, at the end alone.
"""

import json
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nanodlm.config import SamplerConfig, TextRequest, explain
from nanodlm.data.tokenizer import encode
from nanodlm.errors import NanodlmError, redact
from nanodlm.generation.texts import Asked, Frame, Writer
from nanodlm.generation.turns import MOST_CHARACTERS, MOST_ROWS, MOST_TEXTS, Refused, Turns, bounded, frames_of, rows_of

SHARED = 16  # tokens to whose multiples lengths are rounded, so that they share a compilation
NEUTRAL = {  # further fields of clients, and the values with which they mean nothing here
    "logprobs": (0, False),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}


def _texts(value: Any) -> Any:
    """Return a list of texts, of which one may stand alone."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("it is a text, or a list of texts; ids of tokens are not read")
    if len(texts) > MOST_TEXTS:
        raise ValueError(f"it has {len(texts)} texts, and here {MOST_TEXTS} at most")
    return texts


Texts = Annotated[list[Annotated[str, Field(max_length=MOST_CHARACTERS)]], BeforeValidator(_texts)]


class StreamOptions(BaseModel):
    """What else a stream says."""

    include_usage: bool | None = None


class Completions(BaseModel):
    """What is asked for; options of the model's sampler may stand beside these. A field that is null is left out."""

    model_config = ConfigDict(extra="allow")
    model: str = ""
    prompt: Annotated[Texts, Field(min_length=1)] = [""]
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=MOST_TEXTS)
    stop: Texts = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: int = Field(default=0, ge=0, lt=2**31)
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("the body is no JSON object")
        given = {name: value for name, value in given.items() if value is not None}
        known = {*cls.model_fields, *SamplerConfig.model_fields}
        strange = [k for k, v in given.items() if k not in known and v not in NEUTRAL.get(k, ())]
        if strange:
            raise ValueError(f"{', '.join(strange)[:200]}: not possible here; leave it out")
        return {name: value for name, value in given.items() if name in known}


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
        prompts = asked.prompt
        given = [sum(map(len, encode(self.writer.encoding, prompt))) for prompt in prompts for _ in range(asked.n)]
        if len(given) > MOST_TEXTS:
            raise Refused(f"{len(given)} texts are asked for, and here {MOST_TEXTS} at most")
        new = asked.max_tokens or max(16, row - max(given))
        length = max(max(given) + new, 2)
        room = row if length <= row else max(length, MOST_ROWS * row)
        rounded = min(-(-length // SHARED) * SHARED, room)
        options = {"num": asked.n, "seed": asked.seed, "length": rounded} | (asked.model_extra or {})
        try:
            bounded(TextRequest(length=length), row)
            requests = [TextRequest(**{**options, "prompt": prompt}) for prompt in prompts]
        except ValidationError as error:
            raise Refused(explain(error)) from error
        self.rows, self.given = replace(rows_of(self.writer, requests), ends=[count + new for count in given]), given
        self._head = {"id": f"cmpl-{time.time_ns():x}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = self.name
        self._stops = [stop for stop in asked.stop if stop]

    async def whole(self, turns: Turns) -> dict[str, Any]:
        """Return all texts, and how many tokens they have."""
        choices = []
        async with turns.one():
            for batch in range(self.rows.batches):
                frames = [frame async for frame in frames_of(self.writer, self.rows, batch, turns)]
                choices += self._choices(frames[-1], batch)
        tokens = sum(count for _, count in choices)
        return {**self._head, "choices": [choice for choice, _ in choices], "usage": self._usage(tokens)}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompts = sum(self.given)
        return {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}

    async def parts(self, turns: Turns) -> AsyncGenerator[str, None]:
        """Yield the texts as server-sent events, each a piece of one of them."""
        held = max(map(len, self._stops), default=1) - 1  # characters at the end that may begin a stop
        tokens = 0
        try:
            async with turns.one():
                for batch in range(self.rows.batches):
                    said, frame = [0] * len(self.given), None
                    async for frame in frames_of(self.writer, self.rows, batch, turns):
                        for i, (choice, _) in enumerate(
                            self._choices(frame, batch, settled=True) if self._settles else ()
                        ):
                            text = choice["text"].rstrip("\ufffd")  # which may be the beginning of a character
                            text = text if choice["finish_reason"] == "stop" else text[: max(0, len(text) - held)]
                            if len(text) > said[i]:
                                yield self._data({**choice, "text": text[said[i] :], "finish_reason": None})
                                said[i] = len(text)
                    for i, (choice, count) in enumerate(self._choices(frame, batch) if frame else ()):
                        yield self._data({**choice, "text": choice["text"][said[i] :]})
                        tokens += count
            if self.asked.stream_options.include_usage:
                yield f"data: {json.dumps({**self._head, 'choices': [], 'usage': self._usage(tokens)})}\n\n"
        except NanodlmError as error:
            yield f"data: {json.dumps({'error': {'message': redact(str(error)), 'type': 'server_error'}})}\n\n"
        yield "data: [DONE]\n\n"

    def _data(self, choice: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self._head, 'choices': [choice]})}\n\n"

    @property
    def _settles(self) -> bool:
        """Whether a token that was decided stays."""
        traits, sampler = self.writer.traits, self.writer.options(self.rows.request).sampler
        return not traits.random_tokens and not str(sampler).startswith("remdm")

    def _choices(self, frame: Frame, batch: int, settled: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the choices of a batch as they are, and how many tokens each has.

        With `settled`, each has no more than is before its first mask. A text ends with the mark of the end of text,
        before the first `stop`, or where it is long enough.
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
            count = len(whole) if cut == len(text) else self._tokens(whole, text[:cut])
            yield {"text": text[:cut], "index": i, "finish_reason": ended, "logprobs": None}, count

    def _tokens(self, ids: list[int], begin: str) -> int:
        """Return how many of the ids it takes until their text begins so."""
        decode = self.writer.encoding.decode
        return bisect_left(range(len(ids)), True, key=lambda count: decode(ids[:count]).startswith(begin))
