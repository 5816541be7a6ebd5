"""The report: one HTML page and one Markdown file with a run's numbers, its loss curve and its samples.

What equal runs have in common lies in `results.json`, which alone makes the report's digest. The pages show speeds,
devices and the curve of the logs besides, which are no part of what a run is.
"""

import base64
import html
import json
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from nanodlm.config import Config
from nanodlm.data.card import CARD, described
from nanodlm.data.tokenizer import END_OF_TEXT
from nanodlm.diffusion.kinds import KINDS
from nanodlm.errors import Emit
from nanodlm.store import Artifact, Attempt

RESULTS = ("updates", "trained_tokens", "parameters", "parameters_sha256")  # of training, that depend on no machine
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; margin: 1rem 0 } th { white-space: nowrap; vertical-align: top }
td, th { text-align: left; padding: .25rem 1.5rem .25rem 0; overflow-wrap: anywhere }
tr { border-bottom: 1px solid #e3e7ec } blockquote { background: #f5f7f9; margin: .8rem 0; padding: .8rem 1rem;
border-left: 3px solid #3b73c4; white-space: pre-wrap } svg { width: 100%; height: auto }
"""


def build(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Gather the results of train, evaluate and sample into `results.json`, `report.html` and `report.md`."""
    train, evaluate, sample = (inputs[name] for name in ("train", "evaluate", "sample"))
    m, t = evaluate.metrics, train.metrics
    by_document, unigram = m["val_stderr_over"] == "documents", m["val_unigram_bits_per_byte"]
    over = f"{m['scored_documents']:,} documents" if by_document else "rows of one document, taken as independent"
    told = config.data.rows != "stream" and not KINDS[config.objective.kind].edges_known
    assumed = ", as end-of-text marks tell them in neighbouring pre-tokenised rows" if m["pretokenized"] else ""
    speed = f"{t['train_tokens_per_second']:,.0f} tokens/s on {t['devices']} {t['device']}"
    if "waiting_share" in t:  # which earlier versions did not measure
        speed += f", {t['waiting_share']:.1%} of the time waiting for rows"
    sets = m.get("sets", [])  # earlier versions had none
    rows = [
        ("validation bound", f"{m['val_bits_per_byte']:.4f} ± {m['val_bits_per_byte_stderr']:.4f} bits per byte"),
        ("", f"{m['val_nats_per_token']:.4f} ± {m['val_nats_per_token_stderr']:.4f} nats per token"),
        ("", f"perplexity {math.exp(m['val_nats_per_token']):.2f} a token"),
        ("", f"{m['val_bits_per_character']:.4f} bits per character"),
        ("unigram entropy", f"{unigram:.4f} bits per byte: the bound is {against_unigram(m)} it"),
        ("standard error", f"over {over}{assumed}"),
        ("validation text", f"{m['scored_tokens']:,} tokens, {m['scored_bytes']:,} bytes"),
        ("", f"{m['scored_characters']:,} characters" + ", given how long each text is" * told),
        *(
            (s["file"], f"{s['bits_per_byte']:.4f} ± {s['bits_per_byte_stderr'] or math.nan:.4f} bits per byte")
            for s in sets
        ),
        ("objective", f"{config.objective.kind}, trained with {config.objective.weighting} weights"),
        ("trained on", f"{t['trained_tokens']:,} tokens in {t['updates']:,} updates"),
        ("speed", speed),
        ("parameters", f"{t['parameters']:,}, sha256 {t['parameters_sha256'][:16]}…"),
        *((artifact.stage, artifact.fingerprint) for artifact in (train, evaluate, sample)),
    ]
    texts = texts_of(sample)
    results = {"run_name": config.exp.run_name, "train": {name: t[name] for name in RESULTS}, "evaluate": m}
    results |= {"samples": texts, "made_from": {name: artifact.digest for name, artifact in inputs.items()}}
    (attempt.path / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True))
    title = html.escape(config.exp.run_name or "nanodlm")
    curve = loss_curve(logs_of(train), m["val_unigram_nats_per_token"])
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n"
    page += f"<h1>{title}</h1>{_html(rows)}<h2>Training</h2>\n{curve}\n<h2>Samples</h2>\n{_html([], texts)}"
    plain = ["# Report", "", *_markdown(rows), "", "## Samples", *_markdown([], texts), ""]
    if card := card_of(evaluate):
        page += f"\n<h2>Data</h2>\n{_html(described(card), card['examples'])}"
        plain += ["## Data", "", *_markdown(described(card), card["examples"]), ""]
    (attempt.path / "report.html").write_text(page + "</html>\n")
    (attempt.path / "report.md").write_text("\n".join(plain))
    return {"below_unigram_percent": round(100 * (1 - m["val_bits_per_byte"] / m["val_unigram_bits_per_byte"]), 2)}


def _html(rows: list[tuple[str, str]], texts: Iterable[str] = ()) -> str:
    table = "\n".join(f"<tr><th>{name}<td>{html.escape(value)}" for name, value in rows)
    return f"<table>\n{table}\n</table>" + "\n".join(f"<blockquote>{html.escape(text)}</blockquote>" for text in texts)


def _markdown(rows: list[tuple[str, str]], texts: Iterable[str] = ()) -> list[str]:
    """Return indented lines, which Markdown takes for code: no markup of theirs."""
    numbers = [f"    {name:<19} {value}" for name, value in rows]
    return numbers + ["\n".join(f"    {line}" for line in ["", *text.splitlines()]) for text in texts]


def card_of(evaluate: Artifact) -> dict[str, Any] | None:
    """Return the data card of the shards that were evaluated on, if they have one and are there."""
    shard = next(evaluate.store.find(*item) for item in evaluate.inputs if item[0] == "shard")
    if shard is None or all(file["path"] != CARD for file in shard.manifest["files"]):
        return None
    return json.loads(shard.file(CARD).read_text())


def against_unigram(metrics: dict[str, Any]) -> str:
    """Return how a bound compares with the unigram entropy, such as `25.0% below`."""
    percent = 100 * (metrics["val_bits_per_byte"] / metrics["val_unigram_bits_per_byte"] - 1)
    return f"{abs(percent):.1f}% {'above' if percent > 0 else 'below'}"


def texts_of(sample: Artifact) -> list[str]:
    """Return the sampled texts for people, with an empty line where a document ends."""
    lines = sample.file("samples.jsonl").read_text().splitlines()
    return [json.loads(line)["text"].replace(END_OF_TEXT, "\n\n") for line in lines]


def logs_of(train: Artifact) -> list[dict[str, Any]]:
    """Return the records of a training, as `logs.json` holds them."""
    return json.loads(train.file("logs.json").read_text())


def loss_curve_url(logs: list[dict[str, Any]], unigram: float | None) -> str:
    """Return the `loss_curve` as an address that holds the picture; an empty one before the first record."""
    curve = loss_curve(logs, unigram)
    return curve and f"data:image/svg+xml;base64,{base64.b64encode(curve.encode()).decode()}"


def loss_curve(logs: list[dict[str, Any]], unigram: float | None = None) -> str:
    """Return an SVG of the training bound over updates, with points of the validation bound, in nats per token.

    Each point of the line is the mean of about 1/50 of the records, because the bound of one batch is noisy. A dashed
    line is the unigram entropy. Without a record the text is empty. It has a ground of its own, for pages may be dark.
    """
    names = ("nats_per_token", "val_nats_per_token")
    points, scored = ([(r["step"], r[name]) for r in logs if r.get(name) is not None] for name in names)
    if not points:
        return ""
    means = [part.mean(axis=0) for part in np.array_split(points, min(len(points), 50))]
    flat, last = [] if unigram is None else [unigram], points[-1][0]
    values = [value for _, value in (*means, *scored)] + flat
    low, high = 0.97 * min(values), 1.02 * max(values)
    x, y = partial(np.interp, xp=(0, last), fp=(56, 700)), partial(np.interp, xp=(low, high), fp=(240, 30))
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in means)
    shapes = []
    for value in np.linspace(low, high, 5):
        shapes.append(f'<path d="M56 {y(value):.1f}H700" stroke="#e3e7ec"/>')
        shapes.append(f'<text x="48" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    shapes += [f'<path d="M56 {y(value):.1f}H700" stroke="#c2571a" stroke-dasharray="5 4"/>' for value in flat]
    shapes.append(f'<polyline points="{line}" fill="none" stroke="#3b73c4" stroke-width="2"/>')
    shapes += [f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5" fill="#1f7a4d"/>' for step, value in scored]
    legend = '<tspan fill="#3b73c4">training bound</tspan>'
    legend += '<tspan fill="#1f7a4d" dx="14">validation bound</tspan>' if scored else ""
    legend += '<tspan fill="#c2571a" dx="14">unigram entropy</tspan>' if flat else ""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 290" width="720" height="290" font-size="12" '
        'font-family="system-ui, sans-serif" fill="#5b6776" role="img" aria-label="training bound">'
        f'<rect width="720" height="290" rx="6" fill="#fff"/>{"".join(shapes)}'
        f'<text x="56" y="18" font-weight="600">{legend}</text>'
        f'<text x="56" y="260">0</text><text x="700" y="260" text-anchor="end">{last:,.0f}</text>'
        '<text x="378" y="278" text-anchor="middle">update; bounds in nats per token</text></svg>'
    )
