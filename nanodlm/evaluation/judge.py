"""The judge of samples: how likely, varied, repetitive and copied texts are, beside as many texts that were held out.

    measure             what it is, of tokens                                             source
    gen_nats_per_token  -log p under an autoregressive network, the mean over tokens      arXiv:2211.15089, 2310.16834
    entropy             -sum p log p of a text's own token frequencies, mean over texts   arXiv:2409.02908, section 4
    pooled_entropy      the same of all texts together
    distinct_n          different n-grams over n-grams, of all texts together             arXiv:1510.03055
    repetition          4-grams that were met before in the same text                     arXiv:1908.04319
    self_bleu           BLEU-4 of a text against all others, mean over texts              arXiv:1802.01886
    copied              8-grams that lie in a row that was trained on                     arXiv:2111.09509

No one of them says that texts are good. One word over and over is likely, and its entropy is 0; words at random have
more entropy than real text, and are unlikely. Most change with the length and the number of texts: numbers are read
beside those of real text of the same length and number, never alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tiktoken
from jaxtyping import Float, Int, UInt64

from nanodlm.checkpoints.loading import load_artifact
from nanodlm.config import Config, ScoreConfig
from nanodlm.data import rows as data_rows
from nanodlm.data import tokenizer
from nanodlm.data.documents import Documents
from nanodlm.data.shingles import contains, runs
from nanodlm.errors import Emit, NanodlmError, UsageError, silent
from nanodlm.evaluation.evaluate import Text
from nanodlm.evaluation.hub_judge import HubJudge
from nanodlm.evaluation.scoring import draw
from nanodlm.evaluation.uncertainty import ratio_stderr
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Attempt

Texts = Sequence[Int[np.ndarray, "_"]]
Measure = Callable[[Texts], float]  # NaN where texts are too short, or too few, to say anything
COPIED = 8  # tokens that are a copy
SEARCHED = 2**28  # tokens of training that are searched for copies, half a minute's
GROUPS = 20  # of texts at most, of which each in turn is left out


def ngrams(texts: Texts, n: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return a number for each run of n tokens within a text, equal for equal runs, and the text that it is in.

    >>> [array.tolist() for array in ngrams([np.array([7, 8, 7, 8]), np.array([8, 7])], 2)]
    [[0, 1, 0, 1], [0, 0, 0, 1]]
    """
    tokens = np.unique(np.concatenate(texts), return_inverse=True)[1]
    owner, numbers = np.repeat(np.arange(len(texts)), [len(text) for text in texts]), tokens
    for i in range(1, n):
        numbers = np.unique(numbers[:-1] * len(tokens) + tokens[i:], return_inverse=True)[1]
    inside = owner[: len(numbers)] == owner[n - 1 :]
    return numbers[inside], owner[: len(numbers)][inside]


def counted(texts: Texts, n: int) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
    """Return each n-gram of each text once, sorted by n-gram: its number, its text, and how often it is there."""
    numbers, owner = ngrams(texts, n)
    pairs, counts = np.unique(numbers * len(texts) + owner, return_counts=True)
    return *np.divmod(pairs, len(texts)), counts


def entropy(texts: Texts) -> float:
    """Return the mean over texts of -sum p log p, in nats, p being the share of each token in the text.

    >>> round(entropy([np.array([1, 2]), np.array([3, 3])]), 4)  # (log 2 + 0) / 2
    0.3466
    """
    _, owner, counts = counted(texts, 1)
    p = counts / np.bincount(owner, counts)[owner]
    return float(-(p * np.log(p)).sum() / len(texts))


def distinct(texts: Texts, n: int) -> float:
    """Return how many different n-grams there are in all texts together, over how many n-grams."""
    numbers, _ = ngrams(texts, n)
    return len(np.unique(numbers)) / len(numbers) if len(numbers) else math.nan


def repetition(texts: Texts, n: int = 4) -> float:
    """Return the share of n-grams that were met before in the same text.

    >>> round(repetition([np.array([5, 5, 5, 5, 5, 5])]), 4)  # the second and the third of three
    0.6667
    """
    counts = counted(texts, n)[2]
    return 1 - len(counts) / int(counts.sum()) if len(counts) else math.nan


def self_bleu(texts: Texts) -> float:
    """Return the mean over texts of BLEU with n-grams up to 4, all other texts being the references; of tokens.

    BLEU is exp(min(0, 1 - r / c) + sum_n log(p_n) / 4), c being the text's length, r that of the reference nearest to
    it, and p_n the share of n-grams that are in a reference, each at most as often as in the reference that has most
    of it. Where none is, 0.1 count as found (Chen and Cherry, 2014, the first smoothing), as in Texygen.
    """
    if len(texts) < 2:
        return math.nan
    sizes, logs = np.array([len(text) for text in texts]), np.zeros(len(texts))
    for n in range(1, 5):
        numbers, owner, counts = counted(texts, n)
        order = np.lexsort((counts, numbers))  # those of one n-gram together, the text that has most of it last
        numbers, owner, counts, at = numbers[order], owner[order], counts[order], np.arange(len(order))
        first, last = (np.searchsorted(numbers, numbers, side) - i for i, side in enumerate(("left", "right")))
        rival = np.where(at < last, last, at - 1)
        most = np.where(rival >= first, counts[rival], 0)  # that another text has
        found = np.bincount(owner, np.minimum(counts, most), len(texts))
        logs += np.log(np.maximum(found, 0.1) / np.maximum(sizes - n + 1, 1)) / 4
    others = np.where(np.eye(len(sizes), dtype=bool), np.inf, sizes)
    nearest = others[np.arange(len(sizes)), np.abs(others - sizes[:, None] + 0.25).argmin(axis=1)]
    return float(np.exp(np.minimum(0, 1 - nearest / sizes) + logs).mean())


def in_training(texts: Texts, shard: Artifact) -> UInt64[np.ndarray, "K"]:
    """Return the hashes, sorted, of those 8-grams of texts that lie in a training row of a shard artifact.

    Rows are read once, some at a time, until `SEARCHED` tokens of the first shards are; hashes are of 64 bits.
    """
    wanted, left = np.unique(_hashed(texts)), SEARCHED
    found = [wanted[:0]]
    for part in range(len(shard.metrics["rows_per_shard"])):
        for rows in data_rows.stream(shard.file(data_rows.name(part)), shard.metrics["dtype"]):
            hashes = runs(Documents(rows.ravel(), np.arange(0, rows.size + 1, rows.shape[1])), COPIED)[0]
            found.append(np.unique(hashes[contains(wanted, hashes)]))
            left -= rows.size
            if left <= 0:
                return np.unique(np.concatenate(found))
    return np.unique(np.concatenate(found))


def copied(texts: Texts, trained_on: UInt64[np.ndarray, "K"]) -> float:
    """Return the share of 8-grams of texts whose hashes are among these, sorted ones; see `in_training`."""
    hashes = _hashed(texts)
    return float(contains(trained_on, hashes).mean()) if len(hashes) else math.nan


def _hashed(texts: Texts) -> UInt64[np.ndarray, "N"]:
    offsets = np.cumsum([0, *(len(text) for text in texts)])
    return runs(Documents(np.concatenate(texts).astype(np.uint32), offsets), COPIED)[0]


def with_error(measure: Measure, texts: Texts) -> tuple[float | None, float | None]:
    """Return a measure of texts and its standard error for other texts of the kind; None where there is none.

    Groups of k texts, at most 20 of them, are left out in turn: with n texts the error is the root of (n - k) / k
    times the variance of the measure over that, of a mean with k = 1 the usual one. Of measures that are no means it
    is too large rather than too small (the jackknife: Efron and Stein, 1981).

    >>> with_error(lambda texts: float(np.mean([len(text) for text in texts])), [np.zeros(2), np.zeros(4), np.zeros(6)])
    (4.0, 1.1547005383792515)
    """
    n, k = len(texts), -(-len(texts) // GROUPS)
    value, error = measure(texts), math.nan
    if n > 1:
        fewer = [measure([*texts[:start], *texts[start + k :]]) for start in range(0, n // k * k, k)]
        error = math.sqrt((n - k) / k * float(np.var(fewer)))
    return None if math.isnan(value) else value, None if math.isnan(error) else error


def quality(texts: Texts, trained_on: UInt64[np.ndarray, "K"]) -> dict[str, Any]:
    """Return every measure of texts that needs no judge, and its standard error over texts as `NAME_stderr`."""
    measures: dict[str, Measure] = {"entropy": entropy}
    measures["pooled_entropy"] = lambda texts: entropy([np.concatenate(texts)])
    measures |= {f"distinct_{n}": partial(distinct, n=n) for n in (1, 2, 3)}
    measures |= {"repetition": repetition, "self_bleu": self_bleu, "copied": partial(copied, trained_on=trained_on)}
    found: dict[str, Any] = {"texts": len(texts), "tokens": sum(map(len, texts))}
    for name, measure in measures.items():
        found[name], found[f"{name}_stderr"] = with_error(measure, texts)
    return found


def held_out(config: Config, shard: Artifact, shape: tuple[int, int], end_of_text: int) -> Texts:
    """Return as many texts of a length as samples have, evenly spaced over what a shard artifact holds out."""
    rows = data_rows.read(shard.file("validation.arrayrecord"), shard.metrics["dtype"])
    if config.data.rows == "stream":
        tokens = np.concatenate(rows)
        rows = list(tokens[: len(tokens) // shape[1] * shape[1]].reshape(-1, shape[1])) or [tokens]
    chosen = [rows[i] for i in data_rows.evenly_spaced(len(rows), shape[0])]
    return as_texts(config, [row[: shape[1]][row[: shape[1]] <= end_of_text] for row in chosen], end_of_text)


def as_texts(config: Config, rows: Texts, end_of_text: int) -> Texts:
    """Return the texts that rows are: where they hold whole documents, what follows the first one's mark is none."""
    if config.data.rows == "stream":
        return rows
    return [row[: 1 + [*row.tolist(), end_of_text].index(end_of_text)] for row in rows]


def longer(texts: Texts, tokens: int) -> Texts:
    """Return the texts of more tokens: all, but for held-out documents that are no longer than a prompt."""
    return [text for text in texts if len(text) > tokens]


def measured(
    config: Config, shard: Artifact, tokens: Int[np.ndarray, "B L"], encoding: tiktoken.Encoding
) -> dict[str, Any]:
    """Return the `quality` of samples and of held-out texts, of what follows the prompt."""
    end, given = encoding.eot_token, len(encoding.encode_ordinary(config.sample.prompt))
    pair = as_texts(config, list(tokens), end), held_out(config, shard, tokens.shape, end)
    samples, real = ([text[given:] for text in longer(texts, given)] for texts in pair)
    trained_on = in_training([*samples, *real], shard)
    searched = min(SEARCHED, sum(shard.metrics["rows_per_shard"]) * shard.metrics["seq_len"])
    of_each = {"samples": quality(samples, trained_on), "held_out": quality(real, trained_on)}
    return {"quality": {**of_each, "searched_tokens": searched}}


def nats_of(network: Transformer, texts: Texts, batch_size: int, emit: Emit = silent) -> list[Float[np.ndarray, "_"]]:
    """Return -log p of each token of each text given those before it, under an autoregressive network.

    A text that is longer than the network's rows is scored in windows that overlap by half.
    """
    length, mask = network.seq_len, network.objective.mask_id
    options = ScoreConfig(batch_size=batch_size, stride=max(1, length // 2))
    cut = [Text.cut(text, length, mask - 1, options) for text in texts]
    longest = max(len(row) for of in cut for row in of.rows)
    rows = [np.append(row, np.full(longest - len(row), mask)).astype(np.int32) for of in cut for row in of.rows]
    nats = draw(network, rows, np.concatenate([of.given for of in cut]), options, emit=emit).nats
    return np.split(nats, np.cumsum([len(text) for text in texts])[:-1])


def likelihood(nats: list[Float[np.ndarray, "_"]], sizes: Sequence[int] = ()) -> dict[str, Any]:
    """Return nats per token and, given the bytes of texts, per byte, with the error over texts; and perplexities."""
    sums, tokens = (np.array([of(text) for text in nats], float) for of in (np.sum, len))
    if not tokens.sum():
        raise NanodlmError("there is nothing to judge: the texts are empty")
    found: dict[str, Any] = {}
    for unit, of in {"token": tokens, "byte": np.array(sizes, float)}.items():
        if of.sum():
            found[f"nats_per_{unit}"] = float(sums.sum() / of.sum())
            found[f"nats_per_{unit}_stderr"] = ratio_stderr(sums, of) if len(nats) > 1 else None
    of_each = np.exp(sums[tokens > 0] / tokens[tokens > 0])
    return {**found, "perplexity": math.exp(found["nats_per_token"]), "text_perplexity": float(of_each.mean())}


def judge(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Stage: what samples, and as many held-out texts, cost an autoregressive network, or a model of the hub.

    It writes `judge.json`, the nats, tokens and bytes of each text.
    """
    shard, options = inputs["shard"], config.sample
    tokens = np.load(inputs["sample"].file("tokens.npy"), allow_pickle=False)
    if options.judge.startswith("hf:"):
        encoding = tokenizer.load(inputs["tokenizer"].local())
        reader = HubJudge(options, encoding)
    else:
        check(inputs["train"], shard)
        reader, encoding = load_artifact(inputs["train"])
    given, found, of_each = len(encoding.encode_ordinary(options.prompt)), {}, {}
    count, length, end, sizes = *tokens.shape, encoding.eot_token, tokenizer.token_sizes(encoding)[:, 0]
    samples = longer(as_texts(config, list(tokens), end), given)
    real = [longer(held_out(config, shard, (n * count, length), end), given) for n in (1, 2)]
    for name, texts in (("gen", samples), ("held_out_gen", real[0])):
        if isinstance(reader, HubJudge):
            nats = []
            for text in texts:
                nats.append(reader.nats(text, given))
                emit("progress", done=len(nats), total=len(texts), unit="texts")
        else:
            nats = [of[given:] for of in nats_of(reader, texts, config.eval.batch_size, emit)]
        n_bytes = [int(sizes[text[given:]].sum()) for text in texts]
        found |= {f"{name}_{measure}": value for measure, value in likelihood(nats, n_bytes).items()}
        rows = zip(nats, n_bytes, strict=True)
        of_each[name] = [{"nats": float(of.sum()), "tokens": len(of), "bytes": size} for of, size in rows]
    if isinstance(reader, HubJudge) and options.mauve:
        sets = samples, real[1][::2], real[1][1::2]
        found |= reader.mauve([[text[given:] for text in some] for some in sets], emit)
    called = reader.name if isinstance(reader, HubJudge) else inputs["train"].name
    (attempt.path / "judge.json").write_text(json.dumps({"judge": called, **of_each}, indent=1))
    return found


def check(judge: Artifact, shard: Artifact) -> None:
    """Refuse a judge that reads another tokenizer's tokens than those of the shards that samples are held against."""
    if judge.manifest["inputs"]["tokenizer"]["digest"] != shard.manifest["inputs"]["tokenizer"]["digest"]:
        raise UsageError(f"{judge.name} reads another tokenizer's tokens: name a judge of the same, or twin")
