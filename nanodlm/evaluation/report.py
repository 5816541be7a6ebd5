"""The report: one HTML page and one Markdown file with a run's numbers, its curves, its data and its samples.

What equal runs have in common lies in `results.json`, which alone makes the report's digest. The pages show speeds,
devices and the curves of the logs besides, which are no part of what a run is.
"""

import json
import math
import shlex
from collections.abc import Iterable
from datetime import datetime
from textwrap import TextWrapper
from typing import Any

from nanodlm.config import Config, as_changes
from nanodlm.config.differences import flat
from nanodlm.data.card import described, groups
from nanodlm.diffusion.kinds import KINDS
from nanodlm.errors import Emit
from nanodlm.evaluation import figures, fronts, quality
from nanodlm.evaluation.artifacts import card_of, has, judging, lineage, logs_of, texts_of, twin
from nanodlm.evaluation.page import render
from nanodlm.store import Artifact, Attempt

RESULTS = ("updates", "trained_tokens", "parameters", "parameters_sha256")  # of training, that depend on no machine
PROFILE, SLIDER = "bound_profile.json", "slider.html"  # of evaluate and of sample, which earlier versions lack
FACTS = {
    "download": "{documents:,} documents",
    "tokenizer": "{n_vocab:,} entries",
    "split": "{val_tokens:,} tokens held out",
    "shard": "{train_rows:,} rows",
    "train": "{updates:,} updates",
    "evaluate": "{val_bits_per_byte:.3f} bits per byte",
    "sample": "{samples} texts",
    "frontier": "{points} points",
    "judge": "{gen_nats_per_token:.3f} nats per token",
}


def build(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Gather the results of train, evaluate, sample and, if it was asked for, judge into `results.json` and pages."""
    (train, evaluate, sample), judge = (inputs[name] for name in ("train", "evaluate", "sample")), inputs.get("judge")
    m, t, made = evaluate.metrics, train.metrics, lineage(evaluate, train, sample)
    made |= judging(judge, made) if judge else {}
    frontier = inputs.get("frontier")
    made |= {"frontier": frontier} if frontier else {}
    found = json.loads(frontier.file("frontier.json").read_text()) if frontier else None
    results = {"run_name": config.exp.run_name, "train": {name: t[name] for name in RESULTS}, "evaluate": m}
    results |= {"samples": texts_of(sample), "made_from": {name: one.digest for name, one in inputs.items()}}
    results |= {"judge": judge.metrics} if judge else {}
    (attempt.path / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True))
    card = card_of(made.get("shard"))
    said = _head(config, made) | _numbers(config, evaluate) | _texts(config, sample, judge) | _origin(config, made)
    pictures = _pictures(config, train, evaluate)
    page = render("report.html", card=card and _data(card), frontier=found and fronts.shown(found), **said, **pictures)
    (attempt.path / "report.html").write_text(page)
    plain = ["# Report", "", *_markdown(_rows(said)), "", "## Samples", *_markdown([], said["samples"]), ""]
    if said["quality"]:
        plain += ["## Beside held-out text", "", *_markdown(_beside(said)), ""]
    if found:
        plain += ["## Quality against cost", "", *(f"    {line}" for line in fronts.described(found)), ""]
    if card:
        plain += ["## Data", "", *_markdown(described(card), card["examples"]), ""]
    (attempt.path / "report.md").write_text("\n".join(plain))
    return {"below_unigram_percent": round(100 * (1 - m["val_bits_per_byte"] / m["val_unigram_bits_per_byte"]), 2)}


def _rows(said: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers of the page by name, for `report.md`."""
    (_, bound, within), *others = said["measures"]
    return [
        ("validation bound", f"{bound} bits per byte" + f", 95% interval {within}" * bool(within)),
        *said["units"].items(),
        *((name, f"{value} bits per byte" + f", {within}" * bool(within)) for name, value, within in others),
        ("", said["against"]),
        ("interval over", said["over"]),
        ("scored", said["scored"]),
        ("model", said["what"]),
        *((name, value) for name, value in said["speed"].items() if value),
        ("parameters", f"sha256 {said['made']['train'].metrics['parameters_sha256']}"),
        *((stage, artifact.fingerprint) for stage, artifact in said["made"].items()),
    ]


def _beside(said: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the measures of samples beside held-out text by name, for `report.md`."""
    head = ("", "samples", "held-out text", "")
    lines = [(name, f"{value:<16} {real:<16} {what}".rstrip()) for name, value, real, what in (head, *said["quality"])]
    return [*lines, ("", said["measured"])]


def _head(config: Config, made: dict[str, Artifact]) -> dict[str, Any]:
    """Return what was run, when, and by which command."""
    kind, t, (preset, changes) = config.objective.kind, made["train"].metrics, as_changes(config)
    flags = [shlex.join([f"--{name}", *_words(value)]) for name, value in changes.items()]
    when = datetime.fromisoformat(max(artifact.manifest["created"] for artifact in made.values()))
    a = "An" if kind[0] in "aeiou" else "A"
    what = f"{a} {kind} model of {t['parameters']:,} parameters, trained with {config.objective.weighting} weights "
    what += f"for {t['updates']:,} updates on {t['trained_tokens']:,} tokens of {', '.join(config.data.source)}."
    return {
        "title": config.exp.run_name or f"{a} {kind} model",
        "date": f"{when:%-d %B %Y, %H:%M} UTC",
        "what": what,
        "command": [f"nanodlm run {preset}", *flags],
    }


def _words(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _numbers(config: Config, evaluate: Artifact) -> dict[str, Any]:
    """Return the bound in every unit, beside the unigram entropy, an autoregressive model's number and other sets."""
    m, other = evaluate.metrics, twin(evaluate) if config.objective.kind != "autoregressive" else None
    measures = [("this model", m["val_bits_per_byte"], interval(m))]
    if other:
        name = other.manifest["config"]["exp"]["run_name"] or other.name
        measures.append((f"autoregressive: {name}", other.metrics["val_bits_per_byte"], interval(other.metrics)))
    measures.append(("unigram entropy", m["val_unigram_bits_per_byte"], ""))
    measures += [(named(s), s["bits_per_byte"], interval(s, "")) for s in m.get("sets", [])]
    sizes = ", ".join(f"{m[f'scored_{name}']:,} {name}" for name in ("tokens", "bytes", "characters"))
    told = config.data.rows != "stream" and not KINDS[config.objective.kind].edges_known
    return {
        "number": f"{m['val_bits_per_byte']:.3f}",
        "interval": interval(m),
        "over": over(m),
        "measures": [(name, f"{value:.4f}", within) for name, value, within in measures],
        "against": f"The bound is {against_unigram(m)} the unigram entropy.",
        "scored": f"{sizes}{', given how long each text is' * told}; {m.get('val_protocol', '')}",
        "units": {
            "nats per token": f"{m['val_nats_per_token']:.4f} ± {m['val_nats_per_token_stderr'] or math.nan:.4f}",
            "perplexity a token": f"{math.exp(m['val_nats_per_token']):,.2f}",
            "bits per character": f"{m['val_bits_per_character']:.4f}",
            "standard error": f"{m['val_bits_per_byte_stderr'] or math.nan:.4f} bits per byte",
        },
    }


def interval(metrics: dict[str, Any], of: str = "val_") -> str:
    """Return the 95% interval of a bound in bits per byte, or an empty text where there is none."""
    return " to ".join(f"{end:.3f}" for end in metrics.get(f"{of}bits_per_byte_interval") or ())


def over(metrics: dict[str, Any]) -> str:
    """Return what the standard error of a bound is over."""
    if metrics["val_stderr_over"] != "documents":
        return "rows of one document, taken as independent"
    assumed = ", as end-of-text marks tell them in neighbouring pre-tokenised rows" if metrics["pretokenized"] else ""
    return f"{metrics['scored_documents']:,} documents{assumed}"


def _pictures(config: Config, train: Artifact, evaluate: Artifact) -> dict[str, Any]:
    """Return pictures of the training, and of where the bound comes from."""
    logs, unigram, ema = logs_of(train), evaluate.metrics["val_unigram_nats_per_token"], config.train.ema_decay
    average = f" of the parameters' average (decay {ema:g})" if ema else ""
    caption = "The training bound is the mean of neighbouring records, and the band holds four fifths of them. "
    caption += f"Points are the bound{average} on {config.exp.val_rows} validation rows at each save."
    pictures = {"updates": figures.curve({"the bound": logs}, unigram=unigram), "caption": caption}
    timed = logs and logs[-1].get("seconds")  # which earlier versions did not record
    pictures["seconds"] = figures.curve({"the bound": logs}, "seconds", unigram) if timed else ""
    for name, label, colour in (("lr", "learning rate", "violet"), ("grad_norm", "gradient norm", "teal")):
        line = figures.smoothed(logs, name, colour=colour)
        alt = line and f"The {label} goes from {line.y[0]:.3g} to {line.y[-1]:.3g}, at most {max(line.y):.3g}."
        pictures[name] = figures.lines(alt, [line], "updates", label) if line and alt else ""
    return {"curves": pictures, "profile": _profile(evaluate) if has(evaluate, PROFILE) else {}}


def _profile(evaluate: Artifact) -> dict[str, str]:
    """Return pictures of the bound by the level of noise, where there is any, and by place in the row."""
    found = json.loads(evaluate.file(PROFILE).read_text())
    of, noise = "A token costs {:.2f} nats {} and {:.2f} {}.".format, found["by_noise"] or {"nats_per_token": []}
    levels = [
        pair for pair in zip(noise.get("masked_share", ()), noise["nats_per_token"], strict=True) if pair[1] is not None
    ]
    places = [pair for pair in enumerate(found["by_position"], 1) if pair[1] is not None]  # None is where no token was
    pictures = {"noise": ""}
    if levels:
        (least, first), (most, last) = levels[0], levels[-1]
        said = of(first, f"where {least:.0%} of the row is noise", last, f"where {most:.0%} is")
        share, nats = zip(*levels, strict=True)
        line = figures.Line("", share, nats, "blue", "o-")
        pictures["noise"] = figures.lines(said, [line], "share of the row that is noise", "nats per token")
    said = of(places[0][1], "at the first place of the row", places[-1][1], "at the last")
    number, nats = zip(*places, strict=True)
    line = figures.Line("", number, nats, "green")
    return pictures | {"position": figures.lines(said, [line], "place in the row", "nats per token")}


def _texts(config: Config, sample: Artifact, judge: Artifact | None) -> dict[str, Any]:
    """Return the samples, how they were drawn, and how they measure beside held-out text."""
    how, texts, of_each = config.sample, texts_of(sample), sample.metrics.get("quality", {})
    begun = f", each begun with “{how.prompt}”" if how.prompt else ""
    sampler = how.sampler or KINDS[config.objective.kind].samplers[0]
    said = f"{len(texts)} texts, not picked, of the sampler {sampler} at temperature {how.temperature:g}{begun}."
    slider = sample.file(SLIDER).read_text() if has(sample, SLIDER) else ""
    called = json.loads(judge.file("judge.json").read_text())["judge"] if judge else ""
    return {
        "samples": texts,
        "sampling": said,
        "quality": quality.table(of_each, judge.metrics if judge else {}),
        "measured": quality.measured_on(of_each, called),
        "slider": slider,
        "slid": slider.count("<figure>"),  # of the first texts
    }


def _data(card: dict[str, Any]) -> dict[str, Any]:
    """Return a data card as tables, lists and a picture."""
    said, total, lengths = groups(card), card["training"]["tokens"], card["lengths"]
    spans = {f"{int(low):,} to {2 * int(low) - 1:,}": count for low, count in lengths.items()}
    alt = f"Training documents by length: {'; '.join(f'{n:,} of {span} tokens' for span, n in spans.items())}."
    sides = {side: card[side] for side in ("training", "validation")}
    return {
        "sizes": [(side, *("–" if n is None else f"{n:,}" for n in of.values())) for side, of in sides.items()],
        "lengths": figures.bars(alt, spans, "documents", "green", "{:,.0f}") if spans else "",
        "frequent": [(repr(text), f"{n / total:.2%}") for text, n in card["frequent"]],
        "vocabulary": "; ".join(said["vocabulary"]),
        "left_out": [*said["left out"], *(f"mended: {text}" for text in said.get("mended", ()))],
        "examples": card["examples"],
    }


def _origin(config: Config, made: dict[str, Artifact]) -> dict[str, Any]:
    """Return how long the stages took, on what, and what was made from what."""
    train, of_run = made["train"], {name: artifact for name, artifact in made.items() if name != "frontier"}
    seconds = {name: artifact.manifest["seconds"] for name, artifact in of_run.items()}
    alt = f"Seconds that each stage took: {', '.join(f'{name} {spent:.1f}' for name, spent in seconds.items())}."
    read = {
        name: [n for n, one in made.items() if (one.stage, one.fingerprint) in a.inputs] for name, a in made.items()
    }
    boxes = {name: (_fact(artifact), tuple(read[name])) for name, artifact in made.items()}
    last = tuple(name for name in ("train", "evaluate", "sample", "judge", "frontier") if name in made)
    waiting = train.metrics.get("waiting_share")  # which earlier versions did not measure
    return {
        "speed": {
            "training": f"{train.metrics['train_tokens_per_second']:,.0f} tokens/s",
            "devices": f"{train.metrics['devices']} × {train.metrics['device']}",
            "waiting for rows": None if waiting is None else f"{waiting:.1%} of the time",
            "all stages": f"{sum(seconds.values()):,.0f} s",
        },
        "times": figures.bars(alt, seconds, "seconds", "blue", "{:,.1f}"),
        "lineage": figures.lineage({**boxes, "report": ("this page", last)}),
        "made": made,
        "settings": [(name, json.dumps(v)) for name, v in flat(config.model_dump(mode="json")).items()],
    }


def _fact(artifact: Artifact) -> str:
    """Return the one number of an artifact that says most; earlier versions may not have counted it."""
    try:
        return FACTS.get(artifact.stage, "").format(**artifact.metrics)
    except (KeyError, TypeError):
        return ""


def _markdown(rows: list[tuple[str, str]], texts: Iterable[str] = ()) -> list[str]:
    """Return indented lines, which Markdown takes for code: no markup of theirs. They are as wide as pages show."""
    wrapper = TextWrapper(80, replace_whitespace=False, break_on_hyphens=False)
    shown = [f"{name * (i == 0):<19} {part}" for name, text in rows for i, part in enumerate(wrapper.wrap(text))]
    for number, text in enumerate(texts):
        wrapped = [part for line in text.splitlines() for part in wrapper.wrap(line) or [""]]
        shown += ["", *["···", ""] * (number > 0), *wrapped]
    return [f"    {line}" for line in shown]


def named(scored: dict[str, Any]) -> str:
    """Return the name of a set, and how many of its rows were left out, such as `a.jsonl (left out: 2 null)`."""
    rows = ", ".join(f"{count:,} {why}" for why, count in scored.get("left_out", {}).items())
    return scored["file"] + f" (left out: {rows})" * bool(rows)


def against_unigram(metrics: dict[str, Any]) -> str:
    """Return how a bound compares with the unigram entropy, such as `25.0% below`."""
    percent = 100 * (metrics["val_bits_per_byte"] / metrics["val_unigram_bits_per_byte"] - 1)
    return f"{abs(percent):.1f}% {'above' if percent > 0 else 'below'}"
