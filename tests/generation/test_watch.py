"""What is kept of a text's steps, and how it is shown."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from nanodlm.data.tokenizer import plain_bytes
from nanodlm.generation import slider
from nanodlm.generation.watch import BACK, COLOURS, FRAMES, Recording, gif, moments, pieces, places, play, record

MASK = 257
TAKEN_BACK = Recording(
    ["We", None, None],
    [[(1, " the", 0.5)], [(1, None, 0.0), (2, " people", 0.75)], [(1, " <b>", 0.25)]],
    [1, 3, 4],
    4,
)


def recorded(length: int, steps: int) -> Recording:
    """A text in whose steps every token changes."""
    tokens = np.random.default_rng(0).integers(65, 91, (steps + 1, length))
    tokens[0] = MASK
    return record([(row[None], np.full((1, length), 0.5)) for row in tokens], 0, length, plain_bytes())


def test_a_recording_leads_to_the_text_through_the_steps_in_which_something_changes() -> None:
    rows = ["____", "__c_", "__c_", "a_c_", "a_cd", "abcd"]
    tokens = np.array([[MASK if c == "_" else ord(c) for c in row] for row in rows])
    confidence = np.linspace(0, 1, tokens.size).reshape(tokens.shape)
    made = record([*zip(tokens[:, None], confidence[:, None], strict=True)], 0, 4, plain_bytes())
    assert ["".join(piece or "_" for piece in frame) for frame in made.frames()] == [*rows[:2], *rows[3:]]
    assert (made.steps, made.total, made.text) == ([1, 3, 4, 5], 5, "abcd")
    assert made.changes[0] == [(2, "c", round(6 / 23, 3))]


def test_long_texts_keep_fewer_steps_and_always_the_last() -> None:
    assert len(recorded(4, 300).changes) == FRAMES
    many = recorded(1000, 200)
    assert len(many.changes) <= 2
    assert many.steps[-1] == 200


def test_characters_of_several_tokens_marks_and_controls_are_shown_as_text() -> None:
    assert pieces(plain_bytes(), [*"é".encode(), MASK, 0xE2, 0x82, 256, 27, 9, 10]) == [
        "", "é", None, "", "�", "¶\n", "�", " ", "\n",
    ]  # fmt: skip


def test_lines_break_between_words_and_nothing_is_beyond_the_edge() -> None:
    text = "the people of the\nUnited States antidisestablishmentarianism 漢字漢字漢字漢字漢字漢字"
    spots = places(text, 20)
    assert all(spot.left + spot.width <= 20 for spot in spots if spot)
    assert all(spot is not None for spot, c in zip(spots, text, strict=True) if not c.isspace())
    starts = {spot.line: text[i:].split()[0] for i, spot in reversed([*enumerate(spots)]) if spot}
    assert starts == {
        0: "the", 1: "United", 2: "antidisestablishmentarianism", 3: "arianism", 4: starts[4], 5: starts[5],
    }  # fmt: skip


def test_each_moment_tells_what_is_new_and_what_is_taken_back() -> None:
    seen = list(moments(TAKEN_BACK, 80))
    styles = [[cell.style for cell in cells] for cells in seen]
    assert styles[0] == ["given", "mask", "mask"]
    assert styles[1] == ["given", "fresh", "mask"]
    assert styles[2] == ["given", "back", "fresh"]
    assert styles[3] == ["given", "fresh", COLOURS[2]]
    assert styles[4] == ["given", COLOURS[4], COLOURS[2]]
    texts = ["".join(character for cell in cells for _, character in cell.characters) for cells in seen]
    assert texts == ["We ░░░ ░░░░░░", "We the ░░░░░░", "We the people", "We <b> people", "We <b> people"]


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_of_80_columns_shows_the_steps_and_keeps_the_text(
    colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=8, color_system="truecolor", no_color=not colour)
    play(TAKEN_BACK, console, seconds=0)
    said = file.getvalue()
    assert "step 3 of 4, 1 masks left" in said
    assert ("38;2;" in said) == colour
    assert Console(file=io.StringIO()).is_terminal is False


def test_what_is_no_terminal_gets_the_text_alone() -> None:
    file = io.StringIO()
    play(TAKEN_BACK, Console(file=file, width=80), seconds=100)
    assert file.getvalue() == "We <b> people\n"


def test_text_higher_than_the_terminal_is_shown_around_what_changes_and_then_whole() -> None:
    file = io.StringIO()
    play(recorded(600, 3), Console(file=file, force_terminal=True, width=40, height=10), seconds=0)
    assert max(frame.count("\n") for frame in file.getvalue().split("masks left")[1:3]) < 10
    assert file.getvalue().rpartition("masks left")[2].count("\n") >= 15


def test_a_gif_goes_through_the_steps_over_and_over_and_stays_at_the_end(tmp_path: Path) -> None:
    gif(TAKEN_BACK, tmp_path / "text.gif")
    with Image.open(tmp_path / "text.gif") as image:
        assert image.n_frames == 5
        assert image.info["loop"] == 0
        durations, reds = [], []
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
            colours = {colour for _, colour in image.convert("RGB").getcolors(9999) or []}
            back = tuple(int(BACK[i : i + 2], 16) for i in (1, 3, 5))
            reds.append(any(sum(abs(a - b) for a, b in zip(back, colour, strict=True)) < 40 for colour in colours))
    assert durations[-1] >= 2000 > durations[0]
    assert reds == [False, False, True, False, False]


def test_a_slider_is_self_contained_and_says_the_text_without_scripts() -> None:
    made = slider.fragment([TAKEN_BACK, TAKEN_BACK])
    assert made.count("<figure>") == 2
    assert "<p>We &lt;b&gt; people</p>" in made
    assert "<b>" not in made
    assert "http" not in made
    assert " id=" not in made
    assert slider.page([TAKEN_BACK], "a < b").startswith('<!doctype html><html lang="en"><meta charset="utf-8">')


def test_a_slider_leaves_out_the_texts_that_make_it_too_large() -> None:
    made = slider.fragment([recorded(1000, 50)] * 9)
    assert 0 < made.count("<figure>") < 9
    assert len(made) < 200_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser")
def test_a_browser_shows_each_token_with_its_step_and_probability(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(slider.page([TAKEN_BACK], "A text"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=60)
    assert '<span class="d4" title="step 4 of 4, probability 0.25">&lt;b&gt;</span>' in done.stdout, done.stderr
    assert '<span class="given" title="given">We</span>' in done.stdout
    assert "step 4, 0 masks</output>" in done.stdout
