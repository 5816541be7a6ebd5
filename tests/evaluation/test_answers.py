"""Likelihoods of answers given their prompts."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.cli.main import main
from nanodlm.config import ScoreConfig
from nanodlm.data import tokenizer
from nanodlm.evaluation.answers import text_of
from nanodlm.evaluation.scoring import Drawn, draw
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Store
from tests.support.training import untrained

BYTES = tokenizer.plain_bytes()
MASK = 257


def scored(model: Transformer, *pairs: tuple[str, str], repeats: int = 1) -> Drawn:
    text = text_of([*pairs], BYTES, 8)
    return draw(model, text.rows, text.given, ScoreConfig(batch_size=8, repeats=repeats))


def test_from_left_to_right_an_answer_costs_minus_log_p_after_its_prompt_whatever_follows() -> None:
    model, text = untrained(kind="autoregressive"), b"I: yes"
    x = jnp.array([[MASK, *text[:-1]]])
    log_p = jax.nn.log_softmax(model(x, jnp.zeros((1, 6)))[0, :, :MASK])
    expected = [-float(log_p[i, text[i]]) for i in range(6)]
    drawn = scored(model, ("I: ", "yes"), ("I", ": yes"), ("", "I: yes"))
    assert drawn.by_row[0] == pytest.approx([sum(expected[2:]), sum(expected[1:]), sum(expected)], rel=1e-4)
    assert drawn.stderr_of(np.array([True, False, False])) == 0


@pytest.mark.parametrize("rows", ["stream", "document"])
def test_under_masks_an_answer_of_one_token_costs_what_the_network_says_there_with_or_without_sight_of_an_end(
    rows: str,
) -> None:
    model = untrained(rows, kind="absorbing")
    hidden = jnp.array([[*b"ab", MASK, MASK, MASK, MASK, MASK, MASK]])
    seen = hidden if rows == "stream" else hidden[:, :3]  # of padding a network of documents reads nothing
    log_p = jax.nn.log_softmax(model(seen, jnp.zeros(1))[0, 2, :MASK])
    drawn = scored(model, ("ab", "c"), repeats=3)
    assert drawn.by_row[:, 0] == pytest.approx([-float(log_p[ord("c")])] * 3, rel=1e-4)


def test_uniform_noise_knows_no_masks_so_that_an_answer_ends_its_row() -> None:
    model, short = untrained(kind="uniform"), text_of([("ab", "cd")], BYTES, 4)
    alone = draw(model, short.rows * 8, np.full(8, 2), ScoreConfig(batch_size=8, repeats=40))
    padded = scored(model, *[("ab", "cd")] * 8, repeats=40)
    difference = padded.by_row.sum(axis=1).mean() - alone.by_row.sum(axis=1).mean()
    assert abs(difference) < 4 * math.hypot(padded.noise_stderr or 0, alone.noise_stderr or 0)


def test_long_prompts_lose_their_beginning_and_long_answers_take_several_rows() -> None:
    text = text_of([("0123456789", "ab"), ("01", "abcdefghijk")], BYTES, 8)
    assert [bytes(row.tolist()) for row in text.rows] == [b"456789ab", b"abcdefgh", b"defghijk"]
    assert (text.given.tolist(), text.documents[:, 0].tolist()) == ([6, 0, 5], [0, 1, 1])
    assert b"".join(bytes(part.tolist()) for part in text.scored[1:]) == b"abcdefghijk"


def test_score_tells_of_each_answer_its_nats_and_their_error(
    trained: Artifact, models: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, lines = tmp_path / "asked.jsonl", tmp_path / "of_each.jsonl"
    asked = [{"prompt": f"{n} and one is", "answer": f" {n + 1}"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["score", trained.uri, *words, "--store", models.uri()])
        said = capsys.readouterr()
        return said.out if ended.value.code == 0 else said.err

    words = [str(file), "--given", "prompt", "--column", "answer"]
    said = run(*words, "--repeats", "4", "--per_document", str(lines), "--json")
    (m,) = json.loads(said.splitlines()[-1])["sets"]
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["document"] for line in found] == [*range(9)]
    assert sum(line["nats"] for line in found) == pytest.approx(m["nats_per_token"] * m["tokens"])
    assert (m["tokens"], m["documents"], m["draws"]) == (18, 9, 4)
    assert all(0 < line["noise_stderr"] < line["nats"] for line in found)
    assert "answers given their prompts, what follows masked" in m["protocol"]
    assert "asked.jsonl:1 holds no texts 'question' and 'answer'" in run(*words[:2], "question", *words[3:])
    assert "leave one of them out" in run(*words, "--stride", "4")
    plain = file.rename(tmp_path / "asked.txt")
    assert "name a .jsonl file" in run(str(plain), *words[1:])
