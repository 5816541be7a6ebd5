"""How a text appeared out of masks: what is kept of its steps, and how a terminal and a GIF show them.

Nothing here needs a model or JAX: a recording holds strings, and is the same in a file, a terminal and a page.
"""

import codecs
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

FRAMES, CHANGES = 64, 2000  # at most so many are kept of a text
# Of tokens, by when they were decided, the first ones first: readable on light and dark, and told apart by the
# colour-blind by their lightness.
COLOURS = ("#4f7fe0", "#2f9fc4", "#2ca58d", "#79a83b", "#d19a2a", "#e0703c")
GROUND, INK, MASK, BACK = "#161b22", "#e6e9ef", "#3d4858", "#d64561"  # of a picture; `BACK` is what was taken back
STYLES = {"given": "bold", "mask": "dim", "fresh": "reverse", "back": f"strike {BACK}"}
Change = tuple[int, str | None, float]  # a position, its new text, or None for a mask, and the probability of that


class Recording(NamedTuple):
    """The steps of one text, as JSON can hold them.

    >>> recording = Recording([None, " b"], [[(0, "a", 0.5)]], [3], 4)
    >>> list(recording.frames())
    [[None, ' b'], ['a', ' b']]
    """

    start: list[str | None]  # what stands at each position at first, a mask being None
    changes: list[list[Change]]  # of each step in which anything changed
    steps: list[int]  # the numbers of these, from 1 on
    total: int  # steps that were taken

    def frames(self) -> Iterator[list[str | None]]:
        """Yield what stands at each position, at first and after each change."""
        now = list(self.start)
        yield now
        for changes in self.changes:
            now = list(now)
            for position, piece, _ in changes:
                now[position] = piece
            yield now

    @property
    def text(self) -> str:
        """The text at the end."""
        return "".join(piece or "" for piece in list(self.frames())[-1])


def record(
    frames: Sequence[tuple[Any, ...]], row: int, length: int, encoding: tiktoken.Encoding, most: int = FRAMES
) -> Recording:
    """Keep the steps of the first tokens of a row: how it was at first and after each step.

    A frame begins with ids (B, L) and how probable they were when drawn (B, L). At most so many steps are kept, evenly
    spaced among those in which something changes, the last one always; fewer where more than `CHANGES` tokens, and more
    than one of each position, would change.
    """
    tokens, confidence = (np.stack([frame[i][row, :length] for frame in frames]) for i in (0, 1))
    changed = np.flatnonzero((tokens[1:] != tokens[:-1]).any(axis=1)) + 1
    while True:
        kept = [0, *changed[np.unique(np.linspace(0, len(changed) - 1, min(most, len(changed))).round().astype(int))]]
        shown = [pieces(encoding, tokens[i].tolist()) for i in kept]
        changes = [
            [(at, new, round(float(confidence[i, at]), 3)) for at, new in enumerate(after) if new != before[at]]
            for i, before, after in zip(kept[1:], shown, shown[1:], strict=False)
        ]
        if most == 1 or sum(map(len, changes)) <= max(CHANGES, tokens.shape[1]):
            return Recording(shown[0], changes, [int(i) for i in kept[1:]], len(tokens) - 1)
        most //= 2


def pieces(encoding: tiktoken.Encoding, row: list[int]) -> list[str | None]:
    """Return the text of each token, None for a mask; a character of several tokens is that of its last.

    Characters that would move a terminal's cursor are shown as unknown ones.

    >>> from nanodlm.data.tokenizer import plain_bytes
    >>> pieces(plain_bytes(), [195, 164, 257, 195, 27])
    ['', 'ä', None, '', '��']
    """
    decoder, found = codecs.getincrementaldecoder("utf-8")("replace"), []
    for token in [*row, encoding.n_vocab]:
        if token < encoding.eot_token:
            piece = decoder.decode(encoding.decode_single_token_bytes(token)).replace("\t", " ")
            found.append("".join("�" if (c < " " and c != "\n") or "\x7f" <= c < "\xa0" else c for c in piece))
            continue
        if rest := decoder.decode(b"", final=True):  # of a character that nothing completes
            found[-1] += rest
        found.append("¶\n" if token == encoding.eot_token else None)
    return found[:-1]


class Spot(NamedTuple):
    """Where a character stands: its line, its distance from the left, and its width."""

    line: int
    left: float
    width: float


def places(text: str, limit: float, width: Callable[[str], float] = cell_len) -> list[Spot | None]:
    """Return the place of each character in lines of limited width, broken between words; what is not shown has none.

    >>> [spot and (spot.line, spot.left) for spot in places("ab cd", 4)]
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    """
    spots, line, left = [], 0, 0
    for part in re.findall(r"\n|[^\n\S]+|\S+", text):
        widths = [0 if part == "\n" else width(character) for character in part]
        if left and not part.isspace() and left + sum(widths) > limit:
            line, left = line + 1, 0
        for wide in widths:
            if left + wide > limit and not part.isspace():
                line, left = line + 1, 0
            hidden = part == "\n" or left + wide > limit
            spots.append(None if hidden else Spot(line, left, wide))
            left += 0 if hidden else wide
        if part == "\n":
            line, left = line + 1, 0
    return spots


class Cell(NamedTuple):
    """What a moment shows of a position: characters in places of the finished text, and how."""

    characters: list[tuple[Spot, str]]
    style: str  # a key of `STYLES`, or one of `COLOURS`


def moments(recording: Recording, limit: float, width: Callable[[str], float] = cell_len) -> Iterator[list[Cell]]:
    """Yield what is to be seen at first, after each step, and once more at the end, when nothing is new.

    Every token has the place that it, or what takes it later, has in the finished text, so that nothing moves.
    """
    frames = list(recording.frames())
    final = [piece or "" for piece in frames[-1]]
    spots = iter(places("".join(final), limit, width))
    own = [list(islice(spots, len(piece))) for piece in final]
    styles = ["mask" if piece is None else "given" for piece in frames[0]]
    for i, frame in enumerate([*frames, frames[-1]]):
        now, shown = list(styles), list(frame)
        for position, piece, _ in [[], *recording.changes, []][i]:
            colour = COLOURS[(i - 1) * len(COLOURS) // len(recording.changes)]
            styles[position], now[position] = ("mask", "back") if piece is None else (colour, "fresh")
            shown[position] = frames[i - 1][position] if piece is None else piece
        cells = []
        for of, piece, last, style in zip(own, shown, final, now, strict=True):
            hidden = "".join(" " if character == " " else "░" for character in last)  # a token's leading space stays
            characters = zip(of, (hidden if piece is None else piece).ljust(len(of)), strict=False)
            cells.append(Cell([(spot, character) for spot, character in characters if spot], style))
        yield cells


def play(recording: Recording, console: Console, seconds: float = 4.0) -> None:
    """Let a text appear out of masks on a terminal, in about so many seconds; Ctrl-C goes to its end.

    On what is no terminal, the text alone is printed.
    """
    if not console.is_terminal:
        console.print(Text(recording.text), soft_wrap=True)
        return
    limit, most = min(console.width, 100) - 1, max(1, console.height - 3)
    seen = list(moments(recording, limit))
    pause = min(0.15, seconds / len(seen))
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            for i, cells in enumerate(seen[:-1]):
                lines = _lines(cells)
                new = [spot.line for cell in cells if cell.style in ("fresh", "back") for spot, _ in cell.characters]
                top = min(max(0, (new[0] if new else 0) - most // 2), max(0, len(lines) - most))
                step = recording.steps[i - 1] if i else 0
                left = sum(cell.style in ("mask", "back") for cell in cells)
                foot = Text(f"step {step} of {recording.total}, {left} masks left", "dim")
                live.update(Text("\n").join([*lines[top : top + most], foot]), refresh=True)
                time.sleep(pause)
        except KeyboardInterrupt:
            pass
    console.print(Text("\n").join(_lines(seen[-1])))


def _lines(cells: Iterable[Cell]) -> list[Text]:
    """Return the lines of a moment, for a terminal."""
    lines: list[Text] = []
    for cell in cells:
        for at, shown in _runs(cell):
            lines += [Text() for _ in range(at[0].line + 1 - len(lines))]
            style = "" if shown.isspace() else STYLES.get(cell.style, cell.style)
            lines[at[0].line].append(shown, style)
    return lines


def _runs(cell: Cell) -> Iterator[tuple[list[Spot], str]]:
    """Yield what a position shows in one line, its spaces and its word apart."""
    for _, run in groupby(cell.characters, lambda one: (one[0].line, one[1] == " ")):
        at, characters = zip(*run, strict=True)
        yield list(at), "".join(characters)


def gif(recording: Recording, path: Path, seconds: float = 8.0) -> None:
    """Draw the steps of a text as an animated GIF, over and over; its end stays for a while."""
    from PIL import Image, ImageDraw, ImageFont

    margin, wide, line, font = 28, 760, 32, ImageFont.load_default(20)
    seen = list(moments(recording, wide - 2 * margin, font.getlength))
    lines = 1 + max((spot.line for cell in seen[-1] for spot, _ in cell.characters), default=0)
    size = (wide, lines * line + 2 * margin + 14)
    inks = {"given": "#ffffff", "mask": MASK, "fresh": "#ffffff", "back": BACK}
    images = []
    for i, cells in enumerate(seen):
        image = Image.new("RGB", size, GROUND)
        draw = ImageDraw.Draw(image)
        for cell in cells:
            ink = inks.get(cell.style, cell.style)
            for at, shown in _runs(cell):
                if shown.isspace():
                    continue
                room, x, y = sum(spot.width for spot in at), margin + at[0].left, margin + at[0].line * line
                if shown[0] == "░":
                    draw.rectangle((x, y + 2, x + room, y + line - 9), MASK)
                    continue
                while font.getlength(shown) > room + 1:  # of a token whose place another will take
                    shown = shown[:-1]
                draw.text((x, y), shown, ink, font)
                if cell.style == "back":
                    draw.line((x, y + 13, x + font.getlength(shown), y + 13), ink, 2)
        bar = (wide - 2 * margin) * min(i, len(seen) - 2) / max(1, len(seen) - 2)
        draw.rectangle((margin, size[1] - margin, margin + bar, size[1] - margin + 2), COLOURS[4])
        images.append(image.quantize(32, dither=Image.Dither.NONE))
    pause = int(min(200, 1000 * seconds / len(seen)))
    images[0].save(
        path, "GIF", save_all=True, append_images=images[1:], loop=0, duration=[pause] * (len(images) - 1) + [3000]
    )
