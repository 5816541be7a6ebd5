"""A slider through the steps of texts, as a piece of HTML that any page can hold, and as a page of its own.

It is one `div` with its style, script and data in it: no ids, no network, nothing that reaches outside of it. Without
scripts, and in print, it shows the finished texts.
"""

import html
import json
from collections.abc import Sequence

from nanodlm.generation.watch import COLOURS, Recording

LIMIT = 190_000  # bytes of a fragment; texts that no longer fit are left out

_TINTS = "".join(f".nanodlm-steps .d{i}{{background:{colour}38}}" for i, colour in enumerate(COLOURS))
STYLE = f"""
.nanodlm-steps{{--line:#8886;--mask:#8884;--back:#d64561;font:1rem/1.75 system-ui,sans-serif}}
.nanodlm-steps figure{{margin:0 0 1.6em;padding:.9em 1.1em;border:1px solid var(--line);border-radius:.5em}}
.nanodlm-steps p{{margin:0 0 .7em;white-space:pre-wrap;overflow-wrap:anywhere}}
.nanodlm-steps .bar{{display:flex;gap:.8em;align-items:center;font-size:.85rem}}
.nanodlm-steps button{{font:inherit;min-width:4.6em;padding:.25em .6em;border:1px solid var(--line);border-radius:.4em;
background:transparent;color:inherit;cursor:pointer}}
.nanodlm-steps input{{flex:1;min-width:0;accent-color:{COLOURS[0]}}}
.nanodlm-steps output{{min-width:8.5em;text-align:right;font-variant-numeric:tabular-nums}}
.nanodlm-steps span{{border-radius:.25em;padding:.1em 0}}
.nanodlm-steps span:empty{{display:none}}
.nanodlm-steps .given{{font-weight:600}}
.nanodlm-steps .mask{{background:var(--mask);color:transparent;user-select:none}}
.nanodlm-steps .fresh{{outline:2px solid currentColor;outline-offset:-1px}}
.nanodlm-steps .back{{color:var(--back);text-decoration:line-through}}
{_TINTS}
@media print{{.nanodlm-steps .bar{{display:none}}}}
"""
SCRIPT = """
for (const figure of document.currentScript.parentElement.querySelectorAll("figure")) {
  const {start, changes, steps, total} = JSON.parse(figure.querySelector("script").textContent)
  const [paragraph, bar] = [figure.querySelector("p"), figure.querySelector(".bar")]
  const [button, range, output] = bar.children
  const last = [...start]
  for (const step of changes) for (const [at, piece] of step) last[at] = piece
  const show = (n) => {
    const pieces = [...start], marks = start.map((piece) => piece === null ? ["mask"] : ["given", "given"])
    for (let i = 0; i < n; i++) for (const [at, piece, p] of changes[i]) {
      const fresh = i === n - 1 && n < changes.length
      if (piece === null) {
        marks[at] = fresh ? ["back", "masked again"] : ["mask"]
        if (!fresh) pieces[at] = null
      } else {
        const tint = "d" + Math.floor(i * 6 / changes.length)
        marks[at] = [tint + (fresh ? " fresh" : ""), "step " + steps[i] + " of " + total + ", probability " + p]
        pieces[at] = piece
      }
    }
    paragraph.replaceChildren(...pieces.flatMap((piece, at) => {
      const span = document.createElement("span"), [name, title] = marks[at], text = piece ?? last[at]
      span.textContent = text.trimStart()
      span.className = name
      if (title) span.title = title
      else span.ariaHidden = "true"
      return [text.slice(0, text.length - span.textContent.length), span]
    }))
    const left = marks.filter(([name]) => name === "mask" || name === "back").length
    output.textContent = "step " + (n ? steps[n - 1] : 0) + ", " + left + " masks"
    range.ariaValueText = output.textContent
  }
  let timer = 0
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play" }
  button.onclick = () => {
    if (timer) return stop()
    if (+range.value === changes.length) range.value = 0
    button.textContent = "Pause"
    show(+range.value)
    timer = setInterval(() => {
      range.value = +range.value + 1
      show(+range.value)
      if (+range.value === changes.length) stop()
    }, Math.min(200, 6000 / changes.length))
  }
  range.max = range.value = changes.length
  range.oninput = () => { stop(); show(+range.value) }
  bar.hidden = false
  show(changes.length)
}
"""


def fragment(recordings: Sequence[Recording]) -> str:
    """Return a `div` with a slider for each text, of as many of the first texts as fit into `LIMIT`."""
    figures, size = [], len(STYLE) + len(SCRIPT)
    for number, recording in enumerate(recordings, 1):
        data = json.dumps(recording._asdict(), separators=(",", ":")).replace("<", "\\u003c")
        label = f"Steps of text {number}" if len(recordings) > 1 else "Steps of the text"
        figures.append(
            f"<figure><p>{html.escape(recording.text)}</p>"
            f'<div class="bar" hidden=""><button type="button">Play</button>'
            f'<input type="range" min="0" aria-label="{label}"/><output></output></div>'
            f'<script type="application/json">{data}</script></figure>\n'
        )
        size += len(figures[-1])
        if size > LIMIT:
            figures.pop()
            break
    return f'<div class="nanodlm-steps"><style>{STYLE}</style>\n{"".join(figures)}<script>{{{SCRIPT}}}</script></div>\n'


def page(recordings: Sequence[Recording], title: str) -> str:
    """Return a page with the sliders of texts."""
    style = (
        ":root{color-scheme:light dark}body{max-width:46rem;margin:2rem auto;padding:0 1rem;font:1rem/1.5 system-ui,"
        "sans-serif;background:#fdfdfc;color:#1d2430}@media(prefers-color-scheme:dark){body{background:#14181f;"
        "color:#e4e8ee}}h1{font-size:1.15rem;overflow-wrap:anywhere}"
    )
    tints = "".join(f'<span style="background:{colour}38">&emsp;</span>' for colour in COLOURS)
    legend = f"{tints} when a token was decided, from the first to the last; outlined is new, struck out is taken back."
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{style}</style>\n<h1>{html.escape(title)}</h1>\n<p>{legend}</p>\n"
        f"{fragment(recordings)}</html>\n"
    )
