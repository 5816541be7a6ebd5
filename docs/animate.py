"""Draw a text as it appears out of masks: an animated SVG, as in the README.

    nanodlm run
    python docs/animate.py data/store/train/FINGERPRINT docs/sampling.svg

Any trained model of masked tokens will do, by the address that `nanodlm run` prints or `nanodlm ls` lists.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import jax
import jax.numpy as jnp
import tiktoken

import nanodlm

COLUMNS, CELL, LINE, MARGIN = 64, 10, 30, 30  # characters in a line; the rest in pixels
SECONDS, FIRST, LAST, GONE = (
    14.0,
    6,
    72,
    96,
)  # of one round; the rest in percent of it: writing begins, ends, is cleared
PAPER, MASK, INK, NEW, DIM = "#161b22", "#303a48", "#e6e9ef", "#ffc857", "#8b97a8"


def unmask(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    *,
    start: list[int],
    mask_id: int,
    num_steps: int,
    temperature: float,
) -> tuple[list[int], list[int]]:
    """Return the ids of a text drawn for the masks of `start`, and the step in which each was unmasked (else -1).

    It is ancestral sampling under the linear schedule: from t to s a mask becomes a token with probability (t - s) / t.
    """
    denoise = jax.jit(denoise)
    x_t, step = jnp.array([start]), jnp.full(len(start), -1)
    for i in range(num_steps):
        t, s = 1 - i / num_steps, 1 - (i + 1) / num_steps
        token_key, where_key = jax.random.split(jax.random.fold_in(key, i))
        logits = denoise(x_t, jnp.array([t]))[..., :mask_id] / temperature
        now = (x_t == mask_id) & (jax.random.uniform(where_key, x_t.shape) < (t - s) / t)
        x_t = jnp.where(now, jax.random.categorical(token_key, logits), x_t)
        step = jnp.where(now[0], i, step)
    return x_t[0].tolist(), step.tolist()


def places(texts: list[str]) -> list[tuple[int, int]]:
    """Return the column and line of each token's text; a line breaks only before a word, whose space it drops."""
    words: list[list[str]] = []
    for text in texts:
        if text.startswith(" ") or not words:
            words.append([])
        words[-1].append(text)
    found, column, line = [], 0, 0
    for word in words:
        if column + sum(map(len, word)) > COLUMNS:
            column, line = -word[0].startswith(" "), line + 1
        for text in word:
            found.append((column, line))
            column += len(text)
    return found


def draw(texts: list[str], steps: list[int], num_steps: int) -> str:
    """Return the SVG in which each text takes the place of its mask at its step, over and over."""
    at = places(texts)
    height = 2 * MARGIN + LINE * (at[-1][1] + 1) + 24
    width = 2 * MARGIN + COLUMNS * CELL

    def percent(step: int) -> float:
        return round(FIRST + (LAST - FIRST) * step / num_steps, 2)

    style = [
        f"*{{animation:{SECONDS:g}s infinite;font:16.5px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}}",
        f".m{{fill:{MASK};opacity:0}}.w{{fill:{INK}}}.t{{fill:{DIM};opacity:0}}.c{{fill:{DIM};animation:none}}",
        f".t,.c{{font-size:14px}}.b{{fill:{NEW};animation-name:bar;animation-timing-function:linear}}",
        ".t{animation-timing-function:step-end}",
        f"@keyframes bar{{0%,{FIRST}%{{width:{width - 2 * MARGIN}px}}{LAST}%,{GONE}%{{width:0}}}}",
        "@media(prefers-reduced-motion:reduce){*{animation:none!important}}",
    ]
    for i in range(num_steps + 1):
        a, b = percent(i), percent(i + 1)
        style.append(
            f".m{i}{{animation-name:m{i}}}.w{i}{{animation-name:w{i}}}.t{i}{{animation-name:t{i}}}"
            f"@keyframes m{i}{{0%,{a}%{{opacity:1}}{b}%,{GONE}%{{opacity:0}}100%{{opacity:1}}}}"
            f"@keyframes w{i}{{0%,{a}%{{opacity:0;fill:{NEW}}}{b}%{{opacity:1;fill:{NEW}}}"
            f"{min(b + 10, GONE):g}%,{GONE}%{{opacity:1;fill:{INK}}}100%{{opacity:0}}}}"
            f"@keyframes t{i}{{0%{{opacity:{int(i == 0)}}}{a if i else 0}%{{opacity:1}}"
            f"{b if i < num_steps else 100}%{{opacity:0}}}}"
        )
    shapes = []
    for text, (column, line), step in zip(texts, at, steps, strict=True):
        shown = text.lstrip(" ") or text
        x, y = MARGIN + (column + len(text) - len(shown)) * CELL, MARGIN + line * LINE
        wide = len(shown) * CELL
        if step >= 0:
            shapes.append(f'<rect class="m m{step}" x="{x}" y="{y}" width="{wide - 1}" height="{LINE - 6}" rx="4"/>')
        shapes.append(f'<text class="w w{step}" x="{x}" y="{y + 17}" textLength="{wide}">{escape(shown)}</text>')
    foot = height - MARGIN + 4
    for i in range(num_steps + 1):
        shapes.append(f'<text class="t t{i}" x="{MARGIN}" y="{foot}">t = {1 - i / num_steps:.2f}</text>')
    caption = f"{sum(step >= 0 for step in steps)} masks, {num_steps} steps"
    shapes.append(f'<text class="c" x="{width - MARGIN}" y="{foot}" text-anchor="end">{caption}</text>')
    shapes.append(f'<rect class="b" x="{MARGIN}" y="{foot - 24}" width="0" height="2" rx="1"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">\n'
        f"<title>Masked tokens become a text: {escape(''.join(texts))}</title>\n"
        f"<style>\n{chr(10).join(style)}\n</style>\n"
        f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def words(tokenizer: tiktoken.Encoding, ids: list[int]) -> list[str]:
    """Return the text of each id on its own, with a space for whatever breaks a line."""
    return ["".join(" " if c.isspace() else c for c in tokenizer.decode([i])) for i in ids]


def main() -> None:
    """Read the command line, sample, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a train artifact")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--length", type=int, default=56)
    parser.add_argument("--steps", type=int, default=56)
    parser.add_argument("--temperature", type=float, default=0.55)
    parser.add_argument("--prompt", default="My fellow citizens")
    options = parser.parse_args()
    model, tokenizer = nanodlm.load(options.model)
    prompt = tokenizer.encode_ordinary(options.prompt)
    ids, steps = unmask(
        model,
        jax.random.key(options.seed),
        start=prompt + [tokenizer.n_vocab] * (options.length - len(prompt)),
        mask_id=tokenizer.n_vocab,
        num_steps=options.steps,
        temperature=options.temperature,
    )
    options.picture.write_text(draw(words(tokenizer, ids), steps, options.steps))


if __name__ == "__main__":
    main()
