"""`nanodlm generate`: its files and answers, and a conversation on a real terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from nanodlm.cli.console import Console
from nanodlm.cli.conversation import Conversation
from nanodlm.cli.generate import read_prompts
from nanodlm.cli.main import main
from nanodlm.config import TextRequest
from nanodlm.errors import UsageError
from nanodlm.generation.texts import Writer
from nanodlm.store import Artifact, Store
from tests.support.commands import environment


@pytest.fixture
def generate(trained: Artifact, models: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command in this process; give its exit code, output and errors."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def run(*args: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["generate", trained.uri, *args, "--store", models.uri()])
        return ended.value.code, *capsys.readouterr()

    return run


def test_texts_are_printed_and_the_last_line_of_json_has_them_with_the_calls(generate, trained: Artifact) -> None:
    code, out, err = generate("--prompt", "The ", "--num", "2", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["model"] == trained.uri
    assert result["calls"] == 8  # four steps of the run's sampler, of the first text and of the others
    assert all(text.startswith("The ") for text in result["texts"])
    code, out, err = generate("--prompt", "The ", "--num", "2")
    assert code == 0, err
    assert out == f"\n{'-' * 72}\n".join(result["texts"]) + "\n"


def test_prompts_come_from_a_file_and_texts_go_to_files(generate, trained: Artifact, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "We"}\n{"prompt": "It <"}\n')
    files = {name: str(tmp_path / name) for name in ("texts.jsonl", "text.gif", "texts.html")}
    words = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", files["texts.jsonl"], "--gif", files["text.gif"]]
    code, _, err = generate(*words, "--html", files["texts.html"], "--length", "40")
    assert code == 0, err
    assert "a text of 40 is written half a row at a time" in err
    lines = [json.loads(line) for line in Path(files["texts.jsonl"]).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["We", "It <"]
    assert all(line["text"].startswith(line["prompt"]) for line in lines)
    with Image.open(files["text.gif"]) as image:
        assert image.n_frames > 4
    page = Path(files["texts.html"]).read_text()
    assert page.count("<figure>") == 2
    assert f"<title>{trained.name}: spread, 8 steps, seed 0</title>" in page
    assert "when a token was decided" in page
    written, _, err = generate("--prompt", "We", "--gif", str(tmp_path / "picture.png"))
    assert (written, err) == (0, "")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.format == "GIF", "whatever it is called"


@pytest.mark.parametrize(
    ("content", "name", "prompts"),
    [
        ("a\u2028b\x0cc\r\nd\n", "p.txt", ["a\u2028b\x0cc", "d"]),
        ("a\n\nb", "p.txt", ["a", "", "b"]),
        ('{"prompt": "a"}\n \n', "p.jsonl", ["a"]),
        ('{"prompt": "a\u2028b"}\n', "p.jsonl", ["a\u2028b"]),
        ('{"prompt": 3}\n', "p.jsonl", None),
        ('{"prompt": null}\n', "p.jsonl", None),
    ],
)
def test_prompts_are_texts_between_line_feeds(
    content: str, name: str, prompts: list[str] | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    if prompts is None:
        with pytest.raises(UsageError, match="a text as its `prompt`"):
            read_prompts(str(tmp_path / name))
    else:
        assert read_prompts(str(tmp_path / name)) == prompts


def test_a_prompt_that_is_not_utf8_is_one_line(generate, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "\\ud800"}\n')
    for words in (["--prompts", str(tmp_path / "prompts.jsonl")], ["--prompt", "\udcff"]):
        code, _, err = generate(*words)
        assert code == 2 and len(err.splitlines()) == 1, err


def test_more_texts_than_lengths_are_said(generate) -> None:
    code, _, err = generate("--infill", "a [MASK] b", "--num", "100", "--num-steps", "1")
    assert code == 0 and "only 8 lengths are tried" in err, err


def test_ctrl_c_says_nothing_of_stages(generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", stopped)
    code, _, err = generate("--prompt", "a")
    assert (code, err) == (75, "nanodlm: interrupted before all texts were written\n")


def test_an_unexpected_error_does_not_end_a_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["a", "/quit now", "/help me", "/frob x"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    talk = Conversation(None, TextRequest(), Console(sys.stdout))  # type: ignore[arg-type]
    monkeypatch.setattr(talk, "_write", lambda _: bytearray(2**62))
    assert all(talk._answered() for _ in range(4))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "MemoryError",
        "/quit takes nothing after it",
        "/help takes nothing after it",
        "unknown command /frob",
    ]


BAD = [
    (["--prompts", "none.txt"], 2, "cannot read none.txt: No such file"),
    (["--prompts", "none.txt", "--prompt", "a"], 2, "leave --prompt and --infill out"),
    (["--out", "none/texts.jsonl"], 2, "there is no folder none"),
    (["--html", "/"], 2, "cannot write /: it is a folder"),
    (["--prompt", "x" * 40], 2, "the prompt has 40 tokens and texts have 32: shorten it, or raise --length"),
    (["--temperature", "-1"], 2, "--temperature: Input should be greater than or equal to 0"),
    (["--num", "0"], 2, "--num: Input should be greater than or equal to 1"),
    (["--samplerr", "x"], 2, "perhaps you meant --sampler"),
]


@pytest.mark.parametrize(("words", "code", "says"), BAD)
def test_what_is_wrong_is_one_line(generate, words: list[str], code: int, says: str) -> None:
    ended, out, err = generate(*words)
    assert (ended, out, len(err.splitlines())) == (code, "", 1), err
    assert says in err


def test_a_line_of_a_prompts_file_without_a_prompt_is_named(generate, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "We"}\n{"text": "It"}\n')
    assert "line 2 of" in generate("--prompts", str(tmp_path / "prompts.jsonl"))[2]
    (tmp_path / "empty.txt").touch()
    assert "holds no prompts" in generate("--prompts", str(tmp_path / "empty.txt"))[2]


def test_commands_of_a_conversation_are_completed() -> None:
    assert Conversation.names("/s") == ["/sampler", "/seed", "/steps"]
    assert "/prompt" not in Conversation.names()


class Terminal:
    """A command on a terminal of its own, of 80 columns."""

    def __init__(self, *args: str, **extra: str):
        here, there = pty.openpty()
        code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # so that Ctrl-C reaches it
        code += "from nanodlm.cli.main import main; main()"
        command, environ = [sys.executable, "-c", code, *args], {**os.environ, "TERM": "xterm", **extra}
        environ.pop("NO_COLOR", None)
        pipes = {"stdin": there, "stdout": there, "stderr": there}
        self.process = subprocess.Popen(command, env=environ, **pipes, start_new_session=True)
        os.close(there)
        self.file, self.said = here, ""

    def until(self, pattern: str, seconds: float = 100) -> str:
        """Wait until the command has said something, and return all that it said since the last time."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < ends, self.said
            if select.select([self.file], [], [], 0.1)[0]:
                self.said += os.read(self.file, 65536).decode(errors="replace")
        before, self.said = self.said[: found.end()], self.said[found.end() :]
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", before)

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())


def test_a_conversation_goes_on_through_settings_mistakes_and_ctrl_c_until_its_end(
    trained: Artifact, models: Store, tmp_path: Path
) -> None:
    terminal = Terminal("generate", trained.uri, "--store", models.uri(), NANODLM_CACHE=str(tmp_path))
    try:
        assert "a line is a prompt" in terminal.until("> $")
        terminal.type("The people\n")
        said = terminal.until("seed 0, 4 calls of the network.*\n.*> $")
        assert "masks left" in said
        assert "░" in said
        terminal.type("/temperature x\n")
        assert "temperature: Input should be a valid number" in terminal.until("> $")
        terminal.type("/frob\n")
        assert "unknown command /frob" in terminal.until("> $")
        terminal.type("/watch\n")
        terminal.until("texts are printed.*\n.*> $")
        terminal.type("/steps 100000\n")
        terminal.until("> $")
        terminal.type("We\n")
        terminal.until("[0-9]+ calls of the network")
        terminal.type("\x03")
        terminal.until("stopped.*\n.*> $")
        terminal.type("/steps 2\n/help\n")
        assert "/num_steps 2" in terminal.until("/num_steps.*\n(.*\n)*.*> $")
        terminal.type("a [MASK:3] b\n")
        assert re.search(r"[\n\r]a .{1,3} b\r", terminal.until("seed 1, 2 calls.*\n.*> $"))
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.file)
    assert "The people" in (tmp_path / "history").read_text()
