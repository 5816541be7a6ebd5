"""Commands that put numbers on trained models: the bound of any text under one, and what sets two apart."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from tiktoken import Encoding
from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.checkpoints.finding import find_model
from nanodlm.cli.arguments import Output
from nanodlm.cli.files import check_file, writing
from nanodlm.cli.models import choose
from nanodlm.cli.store import OpenStore
from nanodlm.config import DataConfig, ScoreConfig, parse_address
from nanodlm.data.sources import READERS, format_of
from nanodlm.data.tokenizer import token_sizes
from nanodlm.errors import NanodlmError, UsageError, counted
from nanodlm.store import Store

if TYPE_CHECKING:
    from nanodlm.evaluation.evaluate import Text
    from nanodlm.evaluation.scoring import Drawn

Words = Annotated[
    tuple[str, ...],
    Doc("Model, else the newest, and texts."),
    arg(metavar="[MODEL] FILE ...", help_behavior_hint="(required)"),
]
Column = Annotated[str, Doc("Field of a row that holds the text.")]
Unit = Annotated[Literal["document", "paragraph", "line"], Doc("What one document is in .txt files.")]
Share = Annotated[float, Doc("Share of a file's rows that may be bad (no text, null, invalid UTF-8).")]
Runs = Annotated[
    tuple[str, ...],
    Doc("Trained models, by run or address."),
    arg(metavar="RUN RUN ...", help_behavior_hint="(required)"),
]
Html = Annotated[str, Doc("File for the comparison as a page with pictures."), arg(metavar="FILE")]
Given = Annotated[str, Doc("Score .jsonl files' `--column` given this field.")]
Lines = Annotated[str, Doc("File for the bound of each document, as JSON lines."), arg(metavar="FILE.jsonl")]


def score(
    words: Words,
    /,
    how: Annotated[ScoreConfig, arg(name="")],
    *,
    column: Column = "text",
    sample_by: Unit = "document",
    given: Given = "",
    max_bad: Share = 0.01,
    per_document: Lines = "",
    store: OpenStore,
    out: Output,
) -> None:
    """Bound any texts under a trained model: files, or RECIPE=FILE."""
    from nanodlm.checkpoints.loading import load
    from nanodlm.data import sets
    from nanodlm.evaluation import answers
    from nanodlm.evaluation.evaluate import Text
    from nanodlm.evaluation.evaluate import score as bound

    model, *files = words if words and not is_text(words[0]) else ("", *words)
    if not files:
        raise UsageError("name a file to score: nanodlm score [MODEL] FILE...")
    if given and how.stride:
        raise UsageError("--stride cuts texts into rows, where --given has a row for each: leave one of them out")
    check_file(per_document)
    data, bad, found, lines = DataConfig(column=column, sample_by=sample_by, max_bad=max_bad), sets.Bad(), [], []
    for word in files:
        with _own_flags():
            sets.find(word, data)  # before a model is loaded
    pairs = {word: answers.read_pairs(word, given, column, how.max_rows) for word in files if given}
    address = choose(model, store)
    network, encoding = load(address)
    for word in files:
        if given:
            text = answers.text_of(pairs[word], encoding, network.seq_len)
        else:
            with _own_flags():
                stream, bad = sets.tokens(word, data, encoding)
            text = Text.cut(stream, network.seq_len, encoding.eot_token, how)
        with out.showing("score") as emit:
            metrics, drawn = bound(network, encoding, text, how, emit=emit)
        recipe, _ = sets.recipe_of(word, data)
        published = (recipe and recipe.published) or None
        found.append({"file": word, **metrics, "published": published, "left_out": bad.counts})
        out.text(*described(found[-1]), *([f"  left out {bad}"] * bool(bad.counts)))
        if per_document:
            lines += [{"file": word, **one} for one in by_document(text, drawn, encoding, whole=bool(given))]
    if per_document:
        with writing(per_document):
            Path(per_document).write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.json(model=address, sets=found)


def by_document(text: "Text", drawn: "Drawn", encoding: Encoding, *, whole: bool) -> list[dict[str, Any]]:
    """Return the bound of each document, and where they have `whole` rows, the standard error of its noise, in nats."""
    documents, parts, lines = text.of_tokens(encoding.eot_token), np.concatenate(text.scored), []
    sizes = token_sizes(encoding)[parts, 0]
    nats, tokens, bytes_ = (np.bincount(documents, of) for of in (drawn.nats, np.ones(len(parts)), sizes))
    for number in np.unique(documents).tolist():
        per_byte = nats[number] / np.log(2) / bytes_[number] if bytes_[number] else None
        lines.append({"document": number, "nats": nats[number], "tokens": int(tokens[number])})
        lines[-1] |= {"bytes": int(bytes_[number]), "bits_per_byte": per_byte}
        if whole:
            lines[-1]["noise_stderr"] = drawn.stderr_of(text.documents[:, 0] == number)
    return lines


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """Let an error's advice name the flags of this command."""
    try:
        yield
    except NanodlmError as error:
        told = str(error).replace(", or --data.pretokenized True", "").replace("--data.", "--")
        raise type(error)(told) from error


def is_text(word: str) -> bool:
    """Say if a word names a text to score, and not a model."""
    return os.path.isfile(word) or "=" in word or format_of(word)[0] in READERS


def described(m: dict[str, Any]) -> list[str]:
    """Return lines on a set's bound for people, with the units."""
    known = m["bits_per_byte_stderr"] is not None
    error, per_token = (
        f" ± {m[f'{name}_stderr']:.4f}" if known else "" for name in ("bits_per_byte", "nats_per_token")
    )
    low, high = m["bits_per_byte_interval"] or (0, 0)
    within = f" (95%: {low:.4f} to {high:.4f}, over {m['stderr_over']})" if known else " (one row: no standard error)"
    noise = "" if not m["noise_stderr"] else f", its noise ± {m['noise_stderr']:.4f} bits per byte"
    size = ", ".join(counted(m[name], name) for name in ("tokens", "bytes", "documents", "rows"))
    return [
        f"{m['file']}: {m['bits_per_byte']:.4f}{error} bits per byte{within}",
        f"  {m['nats_per_token']:.4f}{per_token} nats per token, perplexity {m['perplexity']:.2f} a token",
        f"  {size}, {m['draws']} draw{'s' * (m['draws'] > 1)}{noise}",
        f"  {m['protocol']}",
        *([f"  published, in other units: {m['published']}"] if m["published"] else []),
    ]


def compare(runs: Runs, /, *, html: Html = "", store: OpenStore, out: Output) -> None:
    """Say in what trained runs differ from the first."""
    from nanodlm.evaluation import compare as comparing

    if len(runs) < 2:
        raise UsageError("name two runs or more: nanodlm compare RUN RUN...")
    check_file(html)
    found, opened = [], [parse_address(find_model(run, store)) for run in runs]
    if apart := [run for run, at in zip(runs, opened, strict=True) if not at.store]:
        raise UsageError(f"{apart[0]} is no run of a store, with the settings and bounds that are compared")
    made = [comparing.made_from(Store(at.store).open(f"train/{at.fingerprint}")) for at in opened]
    for run, artifacts in zip(runs[1:], made[1:], strict=True):
        of = comparing.compare(made[0], artifacts)
        found.append({"runs": [runs[0], run], **of})
        out.text(f"{runs[0]} -> {run}", *(f"  {name}: {values}" for name, values in of["settings"].items()))
        data = f"other data: {', '.join(of['data'])}" if of["data"] else "same data"
        code = f"other code: {counted(len(of['code']), 'files')}" if of["code"] else "same code"
        out.text(f"  {data}, {code}")
        for m in of["bounds"]:
            values = " -> ".join(f"{bits:.4f}" for bits in m["bits_per_byte"])
            how = "rows in pairs" if m["paired"] else "other rows: as two samples"
            error = f"{m['difference']:+.4f} ± {m['difference_stderr']:.4f}, p = {m['p']:.2g}, {how}"
            out.text(f"  {m['set']}: {values} bits per byte: {error}")
        if of["not_compared"]:
            out.text(f"  bounds are not compared: {of['not_compared']}")
        for name, text in zip((runs[0], run), of["samples"], strict=bool(of["samples"])):
            out.text(f"  a sample of {name}: {' '.join(text.split())}")
    if html:
        with writing(html):
            Path(html).write_text(comparing.page(made, found))
        out.text(f"the page is {html}")
    out.json(comparisons=found)
