"""Texts on request, of networks of every kind; untrained ones, for what they write does not matter here."""

import gc
import math
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest

from nanodlm.build import make_model
from nanodlm.config import SamplerConfig, TextRequest
from nanodlm.data.tokenizer import make_encoding, plain_bytes
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.generation import texts
from nanodlm.generation.texts import Writer, Written
from tests.support.training import tiny

KINDS = ("absorbing", "uniform", "hybrid", "block", "autoregressive")


@cache
def writer(kind: str = "absorbing", **data: Any) -> Writer:
    objective = {"kind": kind} | ({"block_size": 8} if kind == "block" else {})
    config = tiny(model={"seq_len": 16}, objective=objective, data=data)
    made = make_model(config, Vocabulary.of(plain_bytes()))
    made.sampling = SamplerConfig(num_steps=4)
    return Writer(made, plain_bytes())


def write(of: Writer, **request: Any) -> list[Written]:
    return list(of.write([TextRequest(**request)]))


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_a_text_does_not_depend_on_how_many_are_asked_for() -> None:
    many = [text.ids for text in write(writer(), prompt="We", num=10)]
    assert len({*map(tuple, many)}) == 10
    assert [text.ids for text in write(writer(), prompt="We", num=1)] == many[:1]
    assert [text.ids for text in write(writer(), prompt="We", num=3)] == many[:3]
    assert [text.ids for text in write(writer(), prompt="We", seed=1)] != many[:1]


def test_each_prompt_of_several_begins_its_own_texts() -> None:
    requests = [TextRequest(prompt=prompt, num=2) for prompt in ("one", "two")]
    begins = [bytes(text.ids[:3]) for text in writer().write(requests)]
    assert begins == [b"one", b"one", b"two", b"two"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_be_longer_than_a_row_and_what_is_decided_before_a_window_stays(kind: str) -> None:
    of = writer(kind)
    asked = of.asked([TextRequest(prompt="The people", length=37)])
    frames = list(of.frames(asked, 0))
    assert frames[-1].tokens.shape == (1, 37)
    assert bytes(frames[-1].tokens[0, :10].tolist()) == b"The people"
    assert frames[-1].tokens.max() < of.mask_id
    assert (np.diff([frame.calls for frame in frames]) >= 1).all()
    if kind not in ("uniform", "hybrid"):  # which change what was drawn
        for before, after in pairwise(frames):
            known = before.tokens != of.mask_id
            assert (after.tokens[known] == before.tokens[known]).all()
            assert (after.confidence[after.tokens == of.mask_id] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_are_filled_and_what_is_known_around_them_is_kept(kind: str) -> None:
    (text,) = write(writer(kind), infill="a [MASK:2] b[MASK:3]c", length=37)  # as above, so that nothing is compiled
    assert (text.ids[:2], text.ids[4:6], text.ids[9:]) == (ids("a "), ids(" b"), ids("c"))
    assert max(text.ids) < 257


def test_of_gaps_without_a_number_the_texts_with_the_least_bound_per_token_come_first() -> None:
    texts = write(writer(), infill="a[MASK]c", num=3)
    assert len(texts) == 3
    nats = [text.nats_per_token or math.nan for text in texts]
    assert nats == sorted(nats)
    assert all(3 <= len(text.ids) <= 10 for text in texts)
    assert math.isclose(nats[0], math.log(257), rel_tol=0.3), "an untrained network finds every text as costly"


def test_of_many_gaps_without_a_number_distinct_lengths_are_drawn_by_the_seed() -> None:
    of = Writer(make_model(tiny(model={"seq_len": 80}), Vocabulary.of(plain_bytes())), plain_bytes())
    first, again, other = (of.asked([TextRequest(infill="[MASK]a" * 8, seed=seed)]) for seed in (0, 0, 1))
    assert len(first.rows) == len({row.tobytes() for row in first.rows}) == 32
    assert first.ends == again.ends != other.ends
    gaps = [bytes((row[:end] % 256).tolist()).split(b"a")[:-1] for row, end in zip(first.rows, first.ends, strict=True)]
    assert {len(gap) for row in gaps for gap in row} == {*range(1, 9)}
    assert {*of.asked([TextRequest(infill="[MASK]a")]).ends} == {*range(2, 10)}


def test_in_words_that_begin_with_their_space_a_gap_takes_the_one_before_it() -> None:
    encoding = make_encoding("bpe", {bytes([i]): i for i in range(256)})
    of = Writer(writer().network, encoding)
    (row,) = of.asked([TextRequest(infill="a [MASK:1] b")]).rows
    assert row[:4].tolist() == [97, of.mask_id, 32, 98]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("absorbing", {"infill": "no gap"}, r"\[MASK:6\]"),
    ("absorbing", {"infill": "a [MASK:0]"}, r"\[MASK:6\]"),
    ("absorbing", {"infill": "a [MASK:00]"}, r"\[MASK:6\]"),
    ("absorbing", {"infill": "a [MASK:9999999999]"}, r"\[MASK:6\]"),
    ("absorbing", {"infill": "[MASK:999999999]" * 100}, "99,999,999,900 tokens, and 1,000,000 is the most"),
    ("absorbing", {"infill": "[MASK:500001]" * 2}, "1,000,002 tokens"),
    ("absorbing", {"infill": "[MASK:1000000][MASK]"}, "at most 16 tokens"),
    ("absorbing", {"infill": "[MASK]" * 9}, "9 gaps have no number, and 8 may"),
    ("absorbing", {"infill": "a [MASK:x] [MASK]"}, r"\[MASK:6\]"),
    ("absorbing", {"infill": "[MASK]", "prompt": "a"}, "leave one out"),
    ("absorbing", {"infill": "x" * 20 + "[MASK]"}, "at most 16 tokens"),
    ("absorbing", {"prompt": "x" * 16}, "the prompt has 16 tokens and texts have 16: shorten it, or raise --length"),
    ("uniform", {"sampler": "margin"}, "uniform models have no margin sampler"),
    ("block", {"guidance": 1.0}, "without guidance"),
]


@pytest.mark.parametrize(("kind", "request_", "says"), BAD)
def test_what_cannot_be_written_is_refused_before_anything_is_drawn(
    kind: str, request_: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        writer(kind).asked([TextRequest(**request_)])


def test_what_is_not_said_is_as_in_the_models_run() -> None:
    assert write(writer())[0].calls == 4
    assert writer().options(TextRequest(num_steps=2)) == SamplerConfig(num_steps=2, sampler="spread")


def test_a_text_can_be_stopped_between_two_steps_and_another_drawn() -> None:
    of = writer()
    begun = of.frames(of.asked([TextRequest()]), 0)
    next(begun)
    begun.close()
    assert len(write(of)[0].ids) == 16


def test_where_rows_are_documents_a_text_ends_with_its_document() -> None:
    end = plain_bytes().eot_token
    assert writer(rows="document").shown([5, end, 6]) == [5]
    assert writer().shown([5, end, 6]) == [5, end, 6]


def test_a_recorded_text_ends_as_it_is_written() -> None:
    (text,) = writer().write([TextRequest(prompt="ab", num=1)], recorded=True)
    assert text.recording is not None
    assert text.recording.start[:3] == ["a", "b", None]
    assert text.recording.total == 4


def test_logits_that_are_not_finite_end_in_an_error() -> None:
    network = writer().network
    broken = Writer(network, plain_bytes())
    broken._params = jax.tree.map(lambda leaf: leaf * math.nan, broken._params)
    with pytest.raises(NanodlmError, match="not finite"):
        write(broken)


def test_options_that_make_no_sense_together_are_said_in_one_line() -> None:
    with pytest.raises(NanodlmError, match="divide"):
        write(writer(), cache_block=7)


def test_compilations_of_the_last_few_options_alone_are_kept() -> None:
    of, usual = writer(), "{}"
    first = of._walk(usual, (1, 16))
    assert of._walk(usual, (1, 16)) is first
    for temperature in range(1, 17):
        of._walk(f'{{"temperature": {temperature}}}', (1, 16))
    assert of._walk(usual, (1, 16)) is not first


def test_only_some_programs_are_kept_however_many_lengths_and_options_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(texts, "WALKS", 1)
    of, kept = Writer(writer().network, plain_bytes()), []
    for length, temperature in ((6, 1.0), (7, 1.0), (8, 1.0), (8, 0.5)):
        write(of, length=length, temperature=temperature)
        gc.collect()
        live = jax.local_devices()[0].client.live_executables()
        kept.append(sum(one.hlo_modules()[0].name == "jit_step" for one in live))
        del live
    assert len({*kept}) == 1
