"""A trained model for EleutherAI's lm-evaluation-harness (`pip install -c constraints.txt -e '.[harness]'`).

    import lm_eval
    from nanodlm.evaluation.harness import Harness
    found = lm_eval.simple_evaluate(Harness("data/store/train/3f2a…"), tasks=["lambada_openai"])

Likelihoods are bounds: the mean of `draws` of noise, which a seed fixes. So equal calls give equal numbers.
"""

import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nanodlm.checkpoints.loading import load
from nanodlm.config import ScoreConfig
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.sampling import sample
from nanodlm.errors import UsageError
from nanodlm.evaluation.answers import Pair, ids, text_of
from nanodlm.evaluation.evaluate import Text
from nanodlm.evaluation.scoring import draw

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise UsageError("the harness is a package of its own: pip install -c constraints.txt -e '.[harness]'") from error


class Harness(LM):
    """What the harness asks of a model: likelihoods of answers and of texts, and texts.

    A request is an `Instance` of the harness, whose `args` say what is asked.
    """

    def __init__(self, model: str, *, draws: int = 32, batch_size: int = 64, seed: int = 0):
        """Load a model by what `nanodlm.load` takes."""
        super().__init__()
        self._network, self._encoding = load(model)
        self._options = ScoreConfig(batch_size=batch_size, repeats=draws, seed=seed)
        graphdef, samplers = nnx.graphdef(self._network), self._network.objective.traits.samplers
        sampler = "confidence" if "confidence" in samplers else "ancestral"

        def fill(params: Any, rows: Int[Array, "B L"], key: Key[Array, ""], temperature: float) -> Int[Array, "B L"]:
            how: dict[str, Any] = {"temperature": temperature, "sampler": sampler}
            return sample(nnx.merge(graphdef, params), key, shape=(len(rows), rows.shape[1]), prompt=rows, **how)

        self._fill_batch = jax.jit(fill, static_argnames="temperature")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return for each (prompt, answer) the bound on log p of the answer, and if `generate_until` begins with it."""
        text, log_p = self._score([request.args for request in requests])
        rows = np.stack(text.rows)
        hidden = np.where(np.arange(rows.shape[1]) < text.given[:, None], rows, self._mask)
        parts = zip(self._fill(hidden, 0.0), text.given, text.scored, strict=True)
        missed = [(row[n : n + len(asked)] != asked).any() for row, n, asked in parts]
        greedy = np.bincount(text.documents[:, 0], missed, len(requests)) == 0
        return list(zip(log_p.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the bound on log p of each text, in rows of which the last alone is given some of what is before."""
        return self._score([("", *request.args) for request in requests])[1].tolist()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return what each (prompt, options) goes on with, up to `max_gen_toks` or one of the texts in `until`.

        The surest token comes first, or with `do_sample` what is drawn at a `temperature`. A prompt that leaves too
        little of the row is cut at its beginning.
        """
        length, texts = self._network.seq_len, [""] * len(requests)
        rows, places = np.full((len(requests), length), self._mask, np.int32), []
        for row, (prompt, options) in zip(rows, (request.args for request in requests), strict=True):
            room = min(options.get("max_gen_toks", length // 2), length - 1)
            kept = ids(self._encoding, prompt)[room - length :]
            row[: len(kept)] = kept
            places.append(slice(len(kept), len(kept) + room))
        asked = [request.args[1] for request in requests]
        heat = np.array([o.get("temperature", 1.0) if o.get("do_sample") else 0.0 for o in asked])
        for temperature in np.unique(heat).tolist():
            chosen = np.flatnonzero(heat == temperature)
            for i, row in zip(chosen.tolist(), self._fill(rows[chosen], temperature), strict=True):
                texts[i] = self._read(row[places[i]], asked[i].get("until") or [])
        return texts

    @property
    def _mask(self) -> int:
        return Vocabulary.of(self._encoding).mask_id

    def _score(self, pairs: list[Pair]) -> tuple[Text, Float[np.ndarray, "N"]]:
        text = text_of(pairs, self._encoding, self._network.seq_len)
        nats = draw(self._network, text.rows, text.given, self._options).by_row.mean(axis=0)
        return text, -np.bincount(text.documents[:, 0], nats, len(pairs))

    def _fill(self, rows: Int[np.ndarray, "N L"], temperature: float) -> Int[np.ndarray, "N L"]:
        """Return rows with tokens in place of their masks."""
        size, params, filled = min(self._options.batch_size, len(rows)), nnx.state(self._network), []
        for start in range(0, len(rows), size):
            batch = np.resize(rows[start : start + size], (size, rows.shape[1]))
            key = jax.random.fold_in(jax.random.key(self._options.seed), start)
            filled.append(np.asarray(self._fill_batch(params, batch, key, temperature=temperature)))
        return np.concatenate(filled)[: len(rows)]

    def _read(self, tokens: Int[np.ndarray, "T"], until: list[str] | str) -> str:
        """Return the text of tokens, up to an end-of-text mark, or to one of the texts at which it is to end."""
        told, end = tokens.tolist(), self._encoding.eot_token
        text = self._encoding.decode(told[: [*told, end].index(end)])
        stops = [until] if isinstance(until, str) else until
        return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0] if stops else text
