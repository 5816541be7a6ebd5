"""The page of a model, and completions: what is answered, what is refused, and in what order."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from httpx import Client, Response, TimeoutException

from nanodlm.checkpoints.loading import load
from nanodlm.config import TextRequest
from nanodlm.errors import NanodlmError
from nanodlm.generation import service, turns
from nanodlm.generation.completions import Answer, Completions
from nanodlm.generation.texts import Writer
from nanodlm.store import Artifact


@pytest.fixture(scope="module")
def writer(trained: Artifact) -> Writer:
    return Writer(*load(trained.uri))


@pytest.fixture
def client(writer: Writer) -> Iterator[Client]:
    """A client of a server in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(service.make_app(writer, "tiny"), log_level="error"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def events(response: Response) -> list[tuple[str, dict[str, Any]]]:
    lines = [dict(line.split(": ", 1) for line in part.split("\n")) for part in response.text.strip().split("\n\n")]
    return [(of["event"], json.loads(of["data"])) for of in lines]


def completion(client: Client, **asked: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def pieces(response: Response) -> dict[int, str]:
    texts: dict[int, str] = {}
    *parts, end = response.text.strip().split("\n\n")
    assert end == "data: [DONE]"
    for part in parts:
        (choice,) = json.loads(part.removeprefix("data: "))["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_the_events_of_a_text_lead_from_its_masks_to_what_generate_writes(client: Client, writer: Writer) -> None:
    asked = {"prompt": "The people", "seed": 3}
    (_, queued), (first, start), *steps, (last, done) = events(client.get("/api/text", params=asked))
    assert (first, last, queued) == ("start", "done", {"ahead": 0})
    shown = list(start["tokens"])
    assert "".join(shown[:10]) == "The people" and set(shown[10:]) == {None}
    numbers = [step["number"] for _, step in steps]
    assert numbers == sorted({*numbers}) and 0 < numbers[0] and numbers[-1] <= done["steps"] == done["calls"]
    for name, step in steps:
        assert name == "step"
        for i, token, confidence in step["changed"]:
            shown[i] = token
            assert 0 <= confidence <= 1
    written = next(iter(writer.write([TextRequest(prompt="The people", seed=3)])))
    assert done["text"] == written.text and done["calls"] == written.calls and done["seed"] == 3
    assert None not in shown


def test_gaps_without_a_number_show_the_length_that_generate_finds_best(client: Client, writer: Writer) -> None:
    asked = {"infill": "The [MASK] of", "num_steps": 2}
    *_, (name, done) = events(client.get("/api/text", params=asked))
    assert name == "done"
    assert done["text"] == next(iter(writer.write([TextRequest(**asked)]))).text


def test_a_completion_has_the_usual_shape_and_is_the_same_for_a_seed(client: Client) -> None:
    asked = {"prompt": ["The ", "A people"], "n": 2, "max_tokens": 6, "seed": 5}
    answer = completion(client, **asked)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 24, "completion_tokens": 24, "total_tokens": 48}
    assert completion(client, **asked)["choices"] == answer["choices"]
    assert completion(client, **{**asked, "seed": 6})["choices"] != answer["choices"]


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "remdm_cap"])
def test_a_stream_adds_up_to_the_whole(client: Client, sampler: str) -> None:
    asked = {"prompt": "The people", "max_tokens": 12, "sampler": sampler, "num_steps": 6, "n": 2}
    whole = [choice["text"] for choice in completion(client, **asked)["choices"]]
    streamed = pieces(client.post("/v1/completions", json={**asked, "stream": True}))
    assert [streamed[i] for i in range(2)] == whole


def test_a_completion_ends_before_the_first_stop(client: Client) -> None:
    asked = {"prompt": "The people", "max_tokens": 20, "seed": 1}
    whole = completion(client, **asked)["choices"][0]["text"]
    stop = whole[4:6]
    assert stop
    (choice,) = completion(client, **asked, stop=[stop])["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == whole[: whole.find(stop)]
    streamed = pieces(client.post("/v1/completions", json={**asked, "stop": stop, "stream": True}))
    assert streamed[0] == choice["text"]


@pytest.mark.parametrize(
    ("path", "asked", "said"),
    [
        ("/api/text", {"prompt": "x" * 40}, "the prompt has 40 tokens"),
        ("/api/text", {"length": 10_000}, "length is 10,000, and here 256 at most"),
        ("/api/text", {"num_steps": 5000}, "num_steps is 5,000, and here 4,096 at most"),
        ("/api/text", {"sampler": "none"}, "sampler"),
        ("/api/text", {"infill": "no gap"}, r"[MASK:6]"),
        ("/api/text", {"infill": "[MASK:300]"}, "the gaps have 300 tokens, and here 256 at most"),
        ("/api/text", {"infill": "[MASK:999999999]" * 9}, "the gaps have 8,999,999,991 tokens"),
        ("/api/text", {"infill": "x" * 200 + "[MASK:100]"}, "the text has 300 tokens, and here 256 at most"),
        ("/api/text", {"colour": "red"}, "colour"),
        ("/api/text", {"prompt": "x" * 20_001}, "prompt is 20,001"),
        ("/api/tokens", {"text": "x" * 20_001}, "text"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "n": 17}, "n: "),
        ("/v1/completions", {"prompt": ["a"] * 9, "n": 2}, "18 texts are asked for"),
        ("/v1/completions", {"prompt": [1, 2]}, "prompt: it is a text, or a list of texts; ids of tokens are not read"),
        ("/v1/completions", {"prompt": []}, "prompt: Value should have at least 1 item"),
        ("/v1/completions", {"prompt": ["a"] * 17}, "prompt: it has 17 texts, and here 16 at most"),
        ("/v1/completions", {"stop": 3}, "stop: it is a text"),
        ("/v1/completions", {"infill": "[MASK:2]", "num": 3, "length": 9}, "infill, num, length: not possible here"),
        ("/v1/completions", {"logprobs": 5}, "logprobs: not"),
        ("/v1/completions", {"echo": True}, "echo: not"),
        ("/v1/completions", {"best_of": 2}, "best_of: not"),
        ("/v1/completions", {"suffix": "b"}, "suffix: not"),
        ("/v1/completions", [1], "the body is no JSON object"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 300}, "length is 301"),
    ],
)
def test_what_makes_no_sense_or_is_too_much_is_refused_in_a_line(
    client: Client, path: str, asked: dict[str, Any], said: str
) -> None:
    response = client.post(path, json=asked) if path.startswith("/v1") else client.get(path, params=asked)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert said in message and "\n" not in message


def test_what_is_null_or_means_nothing_is_as_if_it_was_not_said(client: Client) -> None:
    usual = dict.fromkeys(
        ("n", "seed", "stream", "model", "stop", "stream_options", "temperature", "suffix", "best_of")
    )
    asked = {"prompt": "The people", "max_tokens": 6}
    answer = completion(client, **asked, **usual, logprobs=0, echo=False)
    assert answer["choices"] == completion(client, **asked, best_of=1, user="me")["choices"]


def test_the_tokens_that_are_returned_are_counted_whole_and_in_a_stream(client: Client) -> None:
    asked = {"prompt": "The people", "max_tokens": 20, "seed": 1}
    whole = completion(client, **asked)["choices"][0]["text"]
    stopped = {**asked, "stop": next(c for c in whole[1:] if c.isascii())}
    answer = completion(client, **stopped)
    cut = whole.index(stopped["stop"])
    assert 0 < answer["usage"]["completion_tokens"] == len(whole[:cut].replace("\ufffd", "?").encode()) < 20, whole
    response = client.post(
        "/v1/completions", json={**stopped, "stream": True, "stream_options": {"include_usage": True}}
    )
    *_, last, _ = response.text.strip().split("\n\n")
    said = json.loads(last.removeprefix("data: "))
    assert said["choices"] == [] and said["usage"] == answer["usage"]


def test_lengths_of_completions_share_a_compilation(writer: Writer) -> None:
    shapes = [
        Answer(writer, "tiny", Completions(prompt=["a"], max_tokens=new)).rows.rows.shape[1] for new in (3, 9, 15, 16)
    ]
    assert shapes == [16, 16, 16, 32]


def test_clients_find_the_model_and_errors_have_one_shape(client: Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    for response in (client.get("/nothing"), client.get("/v1/completions")):
        assert response.status_code in (404, 405) and response.json()["error"]["message"]


def test_logits_that_are_not_finite_are_a_fault_of_the_server(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        raise NanodlmError("not finite")
        yield

    monkeypatch.setattr(Writer, "frames", broken)
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500


def test_whoever_leaves_a_completion_stops_it(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, closed = Writer.frames, threading.Event()

    def slow(*arguments: Any) -> Iterator[Any]:
        try:
            for _ in range(1000):
                time.sleep(0.02)
                yield next(frames(*arguments))
        finally:
            closed.set()

    monkeypatch.setattr(Writer, "frames", slow)
    with pytest.raises(TimeoutException):
        client.post("/v1/completions", json={"prompt": "a"}, timeout=0.3)
    assert closed.wait(5)


def test_places_are_counted_when_requests_come_at_once_and_nobody_waits_for_a_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "WAITING", 1)

    async def together() -> None:
        queue, written = turns.Turns(), []

        async def events(name: str) -> AsyncGenerator[str, None]:
            async with queue.one():
                for _ in range(3):
                    yield name
                written.append(name)

        first, second = queue.stream(events("a")), queue.stream(events("b"))
        with pytest.raises(turns.Refused):
            queue.stream(events("c"))
        assert await anext(first) == "a"  # and no more of it is read
        assert [event async for event in second] == ["b"] * 3
        await asyncio.sleep(0)  # in which their places become free
        assert written == ["a", "b"] and queue.ahead == 0

    asyncio.run(together())


def test_a_text_that_nobody_reads_is_kept_in_part_and_gives_its_turn_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "UNREAD", 4)
    monkeypatch.setattr(turns, "PATIENCE", 0.1)

    async def together() -> None:
        queue, made = turns.Turns(), 0

        async def events() -> AsyncGenerator[str, None]:
            nonlocal made
            async with queue.one():
                for _ in range(9):
                    made += 1
                    yield str(made)

        unread, read = queue.stream(events()), queue.stream(events())
        assert [event async for event in read] == [str(5 + i) for i in range(1, 10)], "the other has left its turn"
        assert [event async for event in unread] == ["1", "2", "3", "4"]
        await asyncio.sleep(0)
        assert queue.ahead == 0

    asyncio.run(together())


def test_when_the_server_ends_a_text_fails_in_a_line(writer: Writer) -> None:
    async def ended() -> list[str]:
        queue = turns.Turns()
        queue.ended = True
        return [event async for event in service.watched(writer, writer.asked([TextRequest()]), queue, 0)]

    assert "event: failed" in (last := asyncio.run(ended())[-1]) and "the server ends" in last


def test_other_sites_and_other_names_are_refused(client: Client) -> None:
    assert client.get("/api/model").status_code == 200
    assert client.get("/api/model", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get("/api/model", headers={"host": "attacker.example"}).status_code == 400
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert sum(len(client.get(path).content) for path in service.PAGES) < 60_000


def test_others_are_answered_while_a_long_prompt_is_read(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read, asked = threading.Event(), threading.Event(), Writer.asked

    def slow(*arguments: Any) -> Any:
        reads.set()
        assert read.wait(30)
        return asked(*arguments)

    monkeypatch.setattr(Writer, "asked", slow)
    thread = threading.Thread(target=client.get, args=["/api/text"], kwargs={"params": {"num_steps": 2}})
    thread.start()
    assert reads.wait(30)
    assert client.get("/page.css", timeout=5).status_code == 200
    read.set()
    thread.join(30)


def test_one_text_is_written_at_a_time_and_too_many_are_told_to_come_back(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "WAITING", 1)
    frames, under_way, most, statuses = Writer.frames, 0, 0, []
    go_on = threading.Event()

    def slow(*arguments: Any) -> Iterator[Any]:
        nonlocal under_way, most
        under_way, most = under_way + 1, max(most, under_way + 1)
        go_on.wait(30)
        yield from frames(*arguments)
        under_way -= 1

    monkeypatch.setattr(Writer, "frames", slow)

    def ask() -> None:
        statuses.append(client.get("/api/text", params={"num_steps": 2}).status_code)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
        time.sleep(0.2)
    asking[2].join(30)
    assert statuses == [429]
    go_on.set()
    for thread in asking:
        thread.join(30)
    assert sorted(statuses) == [200, 200, 429] and most == 1


def test_a_text_that_takes_too_long_ends_in_a_line(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SECONDS", -1)
    *_, (name, failed) = events(client.get("/api/text"))
    assert name == "failed" and "ask for fewer steps" in failed["message"]
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 504


def test_the_form_offers_what_the_model_can_do(client: Client, writer: Writer) -> None:
    offered = {option["name"]: option for option in client.get("/api/model").json()["options"]}
    assert offered["sampler"]["choices"] == list(writer.traits.samplers)
    assert offered["num_steps"]["value"] == 4 and offered["length"]["value"] is None


@pytest.mark.slow
def test_the_page_writes_masks_steps_back_and_shares_in_a_browser(trained: Artifact, tmp_path: Path) -> None:
    from tests.support.browser import browser
    from tests.support.commands import serving

    with serving(trained.uri) as address, browser(tmp_path / "profile") as page:
        page.open(address)
        page.until("document.querySelectorAll('#options select').length == 2")
        assert f"train/{trained.fingerprint[:8]}" in page.ask("document.querySelector('#model').textContent")
        # By keyboard alone: a prompt, a gap in the place of a word, and go.
        page.ask("document.querySelector('#prompt').focus()")
        page.send("Input.insertText", text="The people <b>of</b> it")
        page.ask("document.querySelector('#prompt').setSelectionRange(4, 11)")
        page.press("m", control=True)
        page.until("document.querySelector('#prompt').value == 'The [MASK:6] <b>of</b> it'")
        page.press("Enter", control=True)
        page.until("/calls of the network/.test(document.querySelector('#status').textContent)")
        assert page.ask("document.querySelectorAll('#text b').length") == 0  # no text becomes markup
        assert "<b>of</b>" in page.ask("document.querySelector('#text').textContent")
        last = page.ask("document.querySelector('#step').max")
        assert int(last) >= 1
        text = page.ask("document.querySelector('#text').textContent")
        page.ask("document.querySelector('#step').focus()")
        page.press("Home")
        page.until("document.querySelectorAll('#text .masked').length == 6")
        page.ask("document.querySelector('#text').focus()")
        page.press("ArrowRight")
        page.until("/given/.test(document.querySelector('#token').textContent)")
        # Another text has forgotten the token; the address alone makes the same text again.
        page.press("Enter", control=True)
        page.until("document.querySelector('#token').textContent == ''")
        page.until("/calls of the network/.test(document.querySelector('#status').textContent)")
        page.ask("document.querySelector('#seed').value = 0; document.querySelector('#next').checked = false")
        page.press("Enter", control=True)
        page.until("/seed 0/.test(document.querySelector('#status').textContent)")
        page.open(page.ask("location.href"))
        page.until("/calls of the network/.test(document.querySelector('#status').textContent)")
        assert page.ask("document.querySelector('#text').textContent") == text
        for width, height in ((390, 844), (820, 1180), (1440, 900)):
            for dark in (False, True):
                page.look(width, height, dark=dark, to=tmp_path / f"{width}-{dark}.png")
                assert page.ask("document.documentElement.scrollWidth") <= width
        assert page.errors == []
