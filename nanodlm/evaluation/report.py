"""The report: one HTML page and one Markdown file with a run's numbers, its loss curve and its samples.

What equal runs have in common lies in `results.json`, which alone makes the report's digest. The pages show speeds,
devices and the curve of the logs besides, which are no part of what a run is.
"""

import base64
import html
import json
import re
from functools import partial
from typing import Any

import numpy as np

from nanodlm.config import Config
from nanodlm.data.tokenizer import END_OF_TEXT
from nanodlm.errors import Emit
from nanodlm.store import Artifact, Attempt

RESULTS = ("updates", "trained_tokens", "parameters", "parameters_sha256")  # of training, that depend on no machine
# What Markdown takes for markup: marks anywhere, addresses, which become links, and how lists and lines begin.
MARKUP = re.compile(r"[\\`*_{}\[\]<>&|~$#@]|:(?=//)|(?<=www)\.|^[-+=]|^\d(?=\d*[.)](\s|$))", re.IGNORECASE)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; margin: 1rem 0 } th { white-space: nowrap; vertical-align: top }
td, th { text-align: left; padding: .25rem 1.5rem .25rem 0; overflow-wrap: anywhere }
tr { border-bottom: 1px solid #e3e7ec } blockquote { background: #f5f7f9; margin: .8rem 0; padding: .8rem 1rem;
border-left: 3px solid #3b73c4; white-space: pre-wrap } svg { width: 100%; height: auto } .note { color: #5b6776 }
"""


def build(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Gather the results of train, evaluate and sample into `results.json`, `report.html` and `report.md`."""
    train, evaluate, sample = (inputs[name] for name in ("train", "evaluate", "sample"))
    m, t = evaluate.metrics, train.metrics
    by_document, unigram = m["val_stderr_over"] == "documents", m["val_unigram_bits_per_byte"]
    over = f"{m['scored_documents']:,} documents" if by_document else "rows of one document, taken as independent"
    assumed = ", as end-of-text marks tell them in neighbouring pre-tokenised rows" if m["pretokenized"] else ""
    speed = f"{t['train_tokens_per_second']:,.0f} tokens/s on {t['devices']} {t['device']}"
    if "waiting_share" in t:  # which earlier versions did not measure
        speed += f", {t['waiting_share']:.1%} of the time waiting for rows"
    rows = [
        ("validation bound", f"{m['val_bits_per_byte']:.4f} ± {m['val_bits_per_byte_stderr']:.4f} bits per byte"),
        ("", f"{m['val_nats_per_token']:.4f} ± {m['val_nats_per_token_stderr']:.4f} nats per token"),
        ("", f"{m['val_bits_per_character']:.4f} bits per character"),
        ("unigram entropy", f"{unigram:.4f} bits per byte: the bound is {against_unigram(m)} it"),
        ("standard error", f"over {over}{assumed}"),
        ("validation text", f"{m['scored_tokens']:,} tokens, {m['scored_bytes']:,} bytes"),
        ("", f"{m['scored_characters']:,} characters"),
        ("objective", f"{config.objective.kind}, trained with {config.objective.weighting} weights"),
        ("trained on", f"{t['trained_tokens']:,} tokens in {t['updates']:,} updates"),
        ("speed", speed),
        ("parameters", f"{t['parameters']:,}, sha256 {t['parameters_sha256'][:16]}…"),
        *((artifact.stage, artifact.fingerprint) for artifact in (train, evaluate, sample)),
    ]
    texts = texts_of(sample)
    title = config.exp.run_name or "nanodlm"
    results = {"run_name": config.exp.run_name, "train": {name: t[name] for name in RESULTS}, "evaluate": m}
    results |= {"samples": texts, "made_from": {name: artifact.digest for name, artifact in inputs.items()}}
    (attempt.path / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True))
    curve = loss_curve(logs_of(train), m["val_unigram_nats_per_token"])
    page = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><table>",
        *(f"<tr><th>{name}<td>{html.escape(value)}" for name, value in rows),
        f"</table><h2>Training</h2>\n{curve}\n<h2>Samples</h2>",
        *(f"<blockquote>{html.escape(text)}</blockquote>" for text in texts),
        "</html>\n",
    ]
    (attempt.path / "report.html").write_text("\n".join(page))
    lines = [f"# {as_text(title)}", "", "| | |", "|---|---|"]
    lines += [*(f"| {name} | {as_text(value)} |" for name, value in rows), ""]
    quoted = ("\n".join("> " + as_text(line) for line in text.splitlines()) + "\n" for text in texts)
    (attempt.path / "report.md").write_text("\n".join([*lines, "## Samples", "", *quoted]))
    return {"below_unigram_percent": round(100 * (1 - m["val_bits_per_byte"] / m["val_unigram_bits_per_byte"]), 2)}


def as_text(line: str) -> str:
    """Return a line of Markdown that shows these words, whatever is in them: no markup, no HTML and no links.

    >>> as_text("# <b> of 0.5")
    '&#35; &#60;b&#62; of 0.5'
    """
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(line.split()))


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

    Each point of the line is the mean of up to 1/50 of the records, because the bound of one batch is noisy. A dashed
    line is the unigram entropy. Without a record the text is empty. It has a ground of its own, for pages may be dark.
    """
    bounds = ("nats_per_token", "val_nats_per_token")
    points, scored = ([(r["step"], r[name]) for r in logs if r.get(name) is not None] for name in bounds)
    if not points:
        return ""
    size = max(1, len(points) // 50)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]
    left, right, top, bottom = 56, 700, 30, 240
    last = points[-1][0]
    values = [v for _, v in means + scored] + ([] if unigram is None else [unigram])
    low, high = min(values) * 0.97, max(values) * 1.02
    x = partial(np.interp, xp=(0, last), fp=(left, right))
    y = partial(np.interp, xp=(low, high), fp=(bottom, top))
    line = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in means)
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    grid = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e3e7ec"/>'
        f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.2f}</text>'
        for v in ticks
    )
    circles = "".join(f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="#1f7a4d"/>' for s, v in scored)
    middle, below, dashed = (left + right) / 2, bottom + 20, ""
    if unigram is not None:
        at = f"{y(unigram):.1f}"
        dashed = f'<line x1="{left}" x2="{right}" y1="{at}" y2="{at}" stroke="#c2571a" stroke-dasharray="5 4"/>'
    names = '<tspan fill="#3b73c4">training bound</tspan>'
    names += '<tspan fill="#1f7a4d" dx="14">validation bound</tspan>' if scored else ""
    names += '<tspan fill="#c2571a" dx="14">unigram entropy</tspan>' if dashed else ""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 290" width="720" height="290" font-size="12" '
        'font-family="system-ui, sans-serif" fill="#5b6776" role="img" aria-label="training bound">'
        f'<rect width="720" height="290" rx="6" fill="#fff"/>{grid}{dashed}'
        f'<polyline points="{line}" fill="none" stroke="#3b73c4" stroke-width="2"/>{circles}'
        f'<text x="{left}" y="{top - 12}" font-weight="600">{names}</text>'
        f'<text x="{left}" y="{below}">0</text><text x="{right}" y="{below}" text-anchor="end">{last:,.0f}</text>'
        f'<text x="{middle}" y="{below + 18}" text-anchor="middle">update; bounds in nats per token</text></svg>'
    )
