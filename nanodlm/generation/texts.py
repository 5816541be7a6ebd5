"""Texts on request: prompts and gaps become rows of ids, which a trained model fills in step by step.

writer = Writer(*nanodlm.load("data/store/train/3f2a…"))
asked = writer.asked([TextRequest(prompt="The people", num=20)])
for frame in writer.frames(asked, 0):  # of the first batch; leaving the loop stops it between two steps
    print(writer.text(frame.tokens[0]))
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nanodlm.config import SamplerConfig, ScoreConfig, TextRequest
from nanodlm.data.tokenizer import encode
from nanodlm.diffusion.sampling import reverse_process
from nanodlm.diffusion.walks import State, Walk, step_by_step
from nanodlm.errors import Emit, NanodlmError, UsageError, counted, silent
from nanodlm.generation.watch import Recording, record
from nanodlm.model.transformer import Transformer

BATCH = 8  # rows that are drawn together, but for the first, which is drawn alone and soon; see `Asked.of_batch`
LONGEST, TRIES = 8, 32  # tokens in a gap without a number, and texts that are tried with such gaps
OPEN, MOST = 8, 1_000_000  # gaps without a number, and tokens in all gaps with one
WALKS = 16  # compilations that are kept, each of one set of options and one shape
DRAWS = 32  # of noise, to compare them
GAP = re.compile(r"\[MASK(?::([0-9]{1,9}))?\]")


class Frame(NamedTuple):
    """A batch of texts as far as they are: their ids, how probable each was when it was drawn, and calls so far."""

    tokens: Int[np.ndarray, "B L"]
    confidence: Float[np.ndarray, "B L"]
    calls: int


@dataclass(frozen=True)
class Asked:
    """Rows to fill in: one for each text, or for each that is tried."""

    rows: Int[np.ndarray, "N L"]  # what is given, and masks
    ends: list[int]  # tokens of each text; what a row holds behind it is not shown
    request: TextRequest  # how they are drawn
    tried: bool = False  # whether they are lengths of gaps, of which `Writer.ranked` finds the best

    @property
    def batches(self) -> int:
        """How many batches they are drawn in."""
        return 1 + -(-(len(self.rows) - 1) // BATCH)

    def of_batch(self, batch: int) -> slice:
        """Return which rows a batch has: the first one alone, then always `BATCH`, of which the last may lack some.

        So what is drawn for a row depends on its number alone, and not on how many rows there are.
        """
        return slice(1 + (batch - 1) * BATCH, 1 + batch * BATCH) if batch else slice(0, 1)


class Written(NamedTuple):
    """A text, its ids, its steps where they were recorded, the calls so far, and its bound where lengths were tried."""

    text: str
    ids: list[int]
    recording: Recording | None
    calls: int
    nats_per_token: float | None = None


class Writer:
    """A trained model that writes what is asked of it; rows of one length are compiled once for each set of options."""

    def __init__(self, network: Transformer, encoding: tiktoken.Encoding):
        self.network, self.encoding = network, encoding
        self.mask_id, self.traits = network.objective.mask_id, network.objective.traits
        self._params, self._walk = nnx.state(network), lru_cache(WALKS)(self._walk_of)

    def options(self, request: TextRequest) -> SamplerConfig:
        """Return how texts are drawn: as asked, and else as the model's run draws its samples."""
        own = (self.network.sampling or SamplerConfig()).model_dump()
        own["sampler"] = own["sampler"] or self.traits.samplers[0]
        options = SamplerConfig(**own | request.model_dump(include=set(own), exclude_none=True))
        kind = self.network.objective.kind
        if options.sampler not in self.traits.samplers:
            raise UsageError(f"{kind} models have no {options.sampler} sampler: leave --sampler out")
        if options.guidance and not self.traits.guidance:
            raise UsageError(f"{kind} models are sampled without guidance: leave --guidance out")
        return options

    def asked(self, requests: Sequence[TextRequest]) -> Asked:
        """Return the rows for requests that differ in their prompts alone, or for a text with gaps."""
        request = requests[0]
        self.options(request)
        length = request.length or self.network.seq_len
        if request.infill:
            if any(one.prompt for one in requests):
                raise UsageError("--prompt is what a text begins with, which --infill says as well: leave one out")
            tried = any(not size for size in GAP.findall(request.infill))
            texts = self._filled(request.infill, request.seed, length)
            texts = texts if tried else texts * request.num
            lengths = [len(text) for text in texts]
            return Asked(self._rows(texts, max(length, *lengths)), lengths, request, tried)
        texts = [self._ids(one.prompt) for one in requests]
        for text in texts:
            if len(text) >= length:
                remedy = "shorten it, or raise --length"
                raise UsageError(f"the prompt has {len(text)} tokens and texts have {length}: {remedy}")
        texts = [text for text in texts for _ in range(request.num)]
        return Asked(self._rows(texts, length), [length] * len(texts), request)

    def _ids(self, text: str) -> list[int]:
        return np.concatenate([[], *encode(self.encoding, text)]).astype(int).tolist()

    def _rows(self, texts: list[list[int]], length: int) -> Int[np.ndarray, "N L"]:
        return np.array([text + [self.mask_id] * (length - len(text)) for text in texts], np.int32)

    def _filled(self, text: str, seed: int, length: int) -> list[list[int]]:
        """Return the ids of a text with masks in its gaps, one list for each choice of lengths that is tried."""
        known, sizes = GAP.split(text)[::2], [int(size or -1) for size in GAP.findall(text)]  # -1 is any number
        if not sizes or 0 in sizes or any("[MASK" in part for part in known):
            raise UsageError("--infill takes a text with [MASK:6], a gap of so many tokens, or [MASK], of any number")
        free, numbered = [i for i, size in enumerate(sizes) if size < 0], sum(max(size, 0) for size in sizes)
        if len(free) > OPEN:
            raise UsageError(f"{len(free)} gaps have no number, and {OPEN} may: number the others, as in [MASK:6]")
        if numbered > MOST:
            raise UsageError(f"the gaps have {numbered:,} tokens, and {MOST:,} is the most")
        if self.encoding.name in ("gpt2", "bpe"):  # whose words begin with the space before them
            known = [*(part.removesuffix(" ") for part in known[:-1]), known[-1]]
        parts, row = [self._ids(part) for part in known], self.network.seq_len
        combinations = LONGEST ** len(free)
        picked = np.arange(combinations)
        if combinations > TRIES:
            picked = np.random.default_rng(seed).choice(combinations, TRIES, replace=False)
        chosen = np.tile(np.array(sizes), (len(picked), 1))
        if free:
            chosen[:, free] = np.stack(np.unravel_index(picked, (LONGEST,) * len(free)), 1) + 1
            if max(length, sum(map(len, parts)) + int(chosen.sum(1).max())) > row:
                raise UsageError(f"texts to compare have at most {row} tokens: number each [MASK:…]")
        return [
            [token for part, n in zip(parts, (*of, 0), strict=True) for token in (*part, *[self.mask_id] * n)]
            for of in chosen.tolist()
        ]

    def frames(self, asked: Asked, batch: int) -> Iterator[Frame]:
        """Yield the texts of one batch as they were given, and after each step.

        A model of whole rows writes longer texts half a row at a time: it is given the half before as clean context.
        """
        options, length = self.options(asked.request), asked.rows.shape[1]
        tokens = np.resize(asked.rows[asked.of_batch(batch)], (BATCH if batch else 1, length))
        confidence, calls = np.zeros(tokens.shape, np.float32), 0
        window = min(length, self.network.seq_len) if self.traits.reads == "row" else length
        key = jax.random.fold_in(jax.random.key(asked.request.seed), batch)
        walk = self._walk(options.model_dump_json(), (len(tokens), window))
        for start in [*range(0, length - window, max(1, window // 2)), length - window]:
            seen, state = np.s_[:, start : start + window], None
            if (tokens[seen] != self.mask_id).all():
                continue
            try:
                for state in walk(self._params, jax.random.fold_in(key, start), tokens[seen]):
                    if start and state.step == 0:  # which the frame before has shown
                        continue
                    tokens, confidence = tokens.copy(), confidence.copy()
                    tokens[seen], confidence[seen] = state.tokens, state.confidence
                    yield Frame(tokens, confidence, calls + int(state.calls))
            except ValueError as error:  # of options that make no sense together, or logits that are not finite
                raise (NanodlmError if state else UsageError)(str(error)) from error
            calls += int(state.calls) if state else 0

    def _walk_of(self, how: str, shape: tuple[int, int]) -> Callable[..., Iterator[State]]:
        """Return what yields the states of a window with options in JSON, given parameters, a key and its ids."""
        options, graphdef = SamplerConfig.model_validate_json(how), nnx.graphdef(self.network)

        def walk_of(params: Any, key: Key[Array, ""], rows: Int[Array, "B L"]) -> Walk:
            network = nnx.merge(graphdef, params)
            return reverse_process(network, key, shape=shape, prompt=rows, **options.model_dump())

        return step_by_step(walk_of)

    def write(
        self, requests: Sequence[TextRequest], *, recorded: bool = False, emit: Emit = silent
    ) -> Iterator["Written"]:
        """Yield the texts for requests that differ in their prompts alone, batch by batch; see `asked`."""
        asked, tried, calls = self.asked(requests), [], 0
        length, row = asked.rows.shape[1], self.network.seq_len
        if length > row and not self.traits.any_length:
            how = f"a text of {length} is written half a row at a time, given the half before"
            emit("message", text=f"the model reads {row} tokens: {how}")
        if asked.tried and asked.request.num > len(asked.rows):
            emit("message", text=f"only {counted(len(asked.rows), 'lengths')} are tried, and so many texts there are")
        for batch in range(asked.batches):
            frames: list[Frame] = []
            for frame in self.frames(asked, batch):
                frames = [*frames, frame] if recorded else [frame]
                emit("progress", done=calls + frame.calls, unit="calls of the network")
            calls += frames[-1].calls
            for row, end in enumerate(asked.ends[asked.of_batch(batch)]):
                ids = self.shown(frames[-1].tokens[row, :end])
                recording = record(frames, row, len(ids), self.encoding) if recorded else None
                tried.append(Written(self.encoding.decode(ids), ids, recording, calls))
            if not asked.tried:
                yield from tried
                tried = []
        if tried:
            nats = self.ranked([text.ids for text in tried])
            for i in np.argsort(nats)[: asked.request.num]:
                yield tried[i]._replace(nats_per_token=float(nats[i]), calls=calls)

    def shown(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        """Return what is shown of a row: where rows are documents, what follows the end of one means nothing."""
        row, end = [int(token) for token in tokens], self.encoding.eot_token
        return row if self.network.padding is None else row[: [*row, end].index(end)]

    def ranked(self, texts: list[list[int]]) -> Float[np.ndarray, "N"]:
        """Return the bound of each text in nats per token, by which texts of several lengths compare.

        It is of the whole text, because the tokens filled in do not tell by themselves how well what is known goes on
        from them; and per token, because each further token costs nats, so that short texts would always be best. The
        rest of the row stays masked.
        """
        from nanodlm.evaluation.scoring import draw

        rows = list(self._rows(texts, self.network.seq_len))
        none_given, options = np.zeros(len(rows), int), ScoreConfig(batch_size=len(rows), repeats=DRAWS)
        nats = draw(self.network, rows, none_given, options).nats
        return np.array([of.mean() for of in np.split(nats, np.cumsum([len(text) for text in texts])[:-1])])
