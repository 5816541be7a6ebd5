"""What a person reads at the end of a run."""

import io
import json
import re
from pathlib import Path

import pytest

from nanodlm.cli.console import Console
from nanodlm.generation.watch import Recording
from nanodlm.store import Store
from tests.support.helpers import committed

METRICS = {
    "evaluate": {"val_bits_per_byte": 2.5, "val_bits_per_byte_stderr": 0.01, "val_unigram_bits_per_byte": 2.0},
    "sample": {"samples": 1, "first_sample": "the people\n\nof"},
    "report": {},
}


def end_of_a_run(store: Store, fingerprint: str) -> list[str]:
    console = Console(io.StringIO())
    files = {"evaluate": "metrics.json", "sample": "samples.txt", "report": "report.html"}
    for stage, file in files.items():
        steps = json.dumps([Recording([None, " <b>"], [[(0, "the", 0.5)]], [1], 1)._asdict()]).encode()
        artifact = committed(store, {file: fingerprint.encode(), "steps.json": steps}, stage, fingerprint)
        artifact.metrics.update(METRICS[stage])
        console.artifacts[stage] = artifact
    console.finish()
    return console._rich.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_end_of_a_run_is_short_lines_with_links_to_what_is_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("data/store")
    end_of_a_run(store, "0" * 64)
    lines = end_of_a_run(store, "1" * 64)
    assert "bits per byte, 25.0% above the unigram entropy of 2.000" in lines[3]
    assert "report.html  data/store/latest/report/report.html" in lines
    assert Path("data/store/latest/report/report.html").read_text() == "1" * 64
    assert max(map(len, lines[4:-1])) < 80
    assert len(list(store)) == 6, "links are no artifacts"


def test_where_links_cannot_be_made_the_whole_path_is_printed(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("not a folder")
    lines = end_of_a_run(Store(str(tmp_path)), "0" * 64)
    (line,) = (line for line in lines if line.startswith("samples.txt"))
    assert Path(line.split()[1]).read_text() == "0" * 64


def test_on_a_terminal_a_text_appears_and_the_report_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal has it
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    end_of_a_run(Store(str(tmp_path)), "0" * 64)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in end_of_a_run(Store(str(tmp_path)), "1" * 64)]
    assert "the <b>" in lines
    bound = lines.index("validation bound 2.500 ± 0.010 bits per byte, 25.0% above the unigram entropy of 2.000")
    assert [line.split()[0] for line in lines[bound + 1 :]] == ["report.html", "samples.txt", "store", "open"]
    assert lines[-1].split()[1] == (tmp_path / "latest/report/report.html").as_uri()


def test_a_terminal_breaks_lines_between_words_and_below_themselves_and_a_pipe_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, shown = " ".join(["people"] * 30), io.StringIO()
    Console(shown).line(words, "train      ")
    assert shown.getvalue() == f"train      {words}\n"
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    shown = io.StringIO()
    console = Console(shown)
    console.line(words, "train      ")
    first, *rest = shown.getvalue().splitlines()
    assert first.split() == ["train", *["people"] * 4]
    assert all(re.fullmatch(r" {11}(people ?)+ *", line) for line in rest)
    shown.truncate(0)
    console.prose(words)
    assert set(shown.getvalue().replace("\0", "").split()) == {"people"}
    shown.truncate(0)
    console.place("report.html", "file:///" + "a" * 60)
    assert "a" * 60 in shown.getvalue()
