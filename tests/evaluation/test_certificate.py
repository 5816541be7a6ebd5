"""Exact likelihoods in orders, whose mean is the bound, and texts that are coded with them and come back."""

import math
from collections.abc import Callable
from itertools import combinations, permutations, product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiktoken import Encoding

from nanodlm.build import make_model
from nanodlm.cli.main import main
from nanodlm.config import PRESETS
from nanodlm.data import tokenizer
from nanodlm.data.documents import Documents
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.corruption import Corruption
from nanodlm.diffusion.kinds import KindName
from nanodlm.errors import NanodlmError, UsageError, silent
from nanodlm.evaluation.certificate import compress, decompress, tokens_of
from nanodlm.evaluation.orders import Order, bound_nats, random_order, walk
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Store
from tests.support import commands
from tests.support.helpers import prose

L, THREE = 4, Vocabulary(3, 2)


def network(kind: KindName, vocabulary: Vocabulary = THREE, length: int = L, **data: bool) -> Transformer:
    """A network that has learned nothing but reads all that it may, the time and the documents among it."""
    shape = {"seq_len": length, "n_layers": 1, "n_heads": 2, "d_model": 8, "d_ff": 16, "zero_init": False}
    how = {"kind": kind, "block_size": length - 1}  # so that the last block is shorter
    model = PRESETS["demo"].replace(model={**shape, "time_conditioning": True}, objective=how, data=data)
    return make_model(model, vocabulary)


def order_nats(model: Transformer, tokens: np.ndarray, order: Order | None, group: int = 1) -> np.ndarray:
    return walk(model, len(tokens), lambda places, log_p: tokens[places], order, group=group)[1]


def exact_bound(model: Transformer, row: np.ndarray, group: int) -> float:
    """The mean over all counts and all subsets of each block, told to be masked before a step of the group."""
    objective, total = model.objective, 0.0
    size = objective.traits.block_size(objective.block_size) or L
    for block in (range(first, min(first + size, L)) for first in range(0, L, size)):
        for n in range(1, len(block) + 1):
            count = len(block) - (len(block) - n) // group * group
            subsets = [list(subset) for subset in combinations(block, count)]
            for subset in subsets:
                x_t = row.copy()
                x_t[subset] = objective.mask_id
                t = objective.schedule.time_of(jnp.full((1, -(-L // size))[: 1 + (size < L)], count / len(block)))
                x_0, noised = jnp.asarray(row[None]), Corruption(jnp.asarray(x_t[None]), t, t, t, t)
                log_p = jax.nn.log_softmax(objective.logits(model, x_0, noised)[0, :, : objective.mask_id])
                total -= float(sum(log_p[i, row[i]] for i in subset)) / count / len(subsets)
    return total


@pytest.mark.parametrize(("kind", "group"), [("absorbing", 1), ("absorbing", 3), ("block", 1), ("block", 2)])
def test_the_mean_over_all_orders_is_the_bound_and_so_is_the_mean_over_noise(kind: KindName, group: int) -> None:
    model, row = network(kind), np.array([2, 0, 1, 1], np.int32)
    size = L if kind == "absorbing" else L - 1
    orders = [list(p + q) for p, q in product(permutations(range(size)), permutations(range(size, L)))]
    rows = np.tile(row, len(orders))
    nats = order_nats(model, rows, lambda shape: np.array(orders), group=group).reshape(-1, L).sum(axis=1)
    assert np.ptp(nats) > 0.01
    assert nats.mean() == pytest.approx(exact_bound(model, row, group), rel=1e-5)
    drawn = bound_nats(model, np.tile(row, 512), group=group, draws=16, seed=0)
    assert drawn.mean() == pytest.approx(nats.mean(), abs=5 * float(drawn.std()) / math.sqrt(512))


@pytest.mark.parametrize("isolate", [False, True])
def test_from_left_to_right_the_bound_is_the_likelihood(isolate: bool) -> None:
    model, tokens = network("autoregressive", isolate_documents=isolate), np.array([2, 0, 2, 1, 1, 2])
    nats = order_nats(model, tokens, random_order(model, 0))
    assert [nats[:L].sum(), nats[L:].sum()] == pytest.approx(
        bound_nats(model, tokens, group=1, draws=1, seed=0), rel=1e-5
    )


@pytest.mark.parametrize(("kind", "surest"), [("absorbing", False), ("absorbing", True), ("block", True)])
def test_the_likelihoods_of_all_rows_add_up_to_one(kind: KindName, surest: bool) -> None:
    model, rows = network(kind), np.array(list(product(range(3), repeat=L))).ravel()
    order = None if surest else lambda shape: np.tile(random_order(model, 1)((1, L)), (shape[0], 1))
    nats = order_nats(model, rows, order).reshape(-1, L).sum(axis=1)
    assert np.exp(-nats).sum() == pytest.approx(1, rel=1e-5)


TEXT = "".join(prose(3)) + "Zwölf <|endoftext|> \r\n\t 𝄞\x00\n"
CORPUS = [Documents(np.frombuffer(TEXT.encode(), np.uint8), np.array([0, len(TEXT.encode())]))]


@pytest.mark.parametrize(
    ("kind", "encoding", "group"),
    [
        ("absorbing", tokenizer.plain_bytes, 1),
        ("absorbing", tokenizer.gpt2, 5),
        ("block", lambda: tokenizer.characters(CORPUS), 1),
        ("block", tokenizer.plain_bytes, 3),
        ("autoregressive", lambda: tokenizer.train_bpe([TEXT], 300), 1),
    ],
)
def test_every_text_comes_back_in_any_tokens_and_orders(
    kind: KindName, encoding: Callable[[], Encoding], group: int
) -> None:
    made, text = encoding(), TEXT.encode()
    model, tokens = network(kind, Vocabulary.of(made), length=24), tokens_of(made, text)
    data, found = compress(model, made, tokens, group=group, seed=3, emit=silent)
    assert decompress(model, made, data, silent) == text
    coder = 8 * (len(data) - found["header_bytes"]) / len(text) - found["model_bits_per_byte"]
    assert 0 <= coder * len(text) < 64 + 0.05 * len(tokens)


def test_a_file_or_model_that_is_not_the_same_is_refused() -> None:
    encoding = tokenizer.plain_bytes()
    model = network("autoregressive", Vocabulary.of(encoding))
    data, _ = compress(model, encoding, tokens_of(encoding, b"Hi!"), group=1, seed=0, emit=silent)
    altered = [data[:-4], data[:-1], b"", data[:50] + bytes([data[50] ^ 1]) + data[51:], data[:-9] + b"?" + data[-8:]]
    for other in altered:
        with pytest.raises(NanodlmError, match="the file is damaged"):
            decompress(model, encoding, other, silent)
    with pytest.raises(NanodlmError, match="another model, whose parameters_sha256 is"):
        decompress(network("autoregressive"), encoding, data, silent)
    with pytest.raises(NanodlmError, match="another text came out"):  # the same parameters, and another meaning
        decompress(network("absorbing", Vocabulary.of(encoding)), encoding, data, silent)
    with pytest.raises(UsageError, match="not UTF-8, from byte 2 on"):
        tokens_of(encoding, b"Hi\xff")
    with pytest.raises(UsageError, match="is empty"):
        tokens_of(encoding, b"")
    with pytest.raises(UsageError, match="uniform noise"):
        order_nats(network("uniform"), np.array([0, 1]), None)


def test_the_command_codes_a_text_in_as_many_bits_as_the_bound_and_another_process_decodes_it(
    trained: Artifact, models: Store, tmp_path: Path
) -> None:
    text, coded, back = tmp_path / "text.txt", tmp_path / "text.ndlm", tmp_path / "back.txt"
    text.write_bytes(TEXT.encode() * 9)
    where = ("--store", models.uri(), "--json")
    found = commands.result_of(commands.nanodlm("certify", trained.name, str(text), "--out", str(coded), *where))
    assert (found["bytes"], found["file_bytes"]) == (len(text.read_bytes()), coded.stat().st_size)
    assert found["bits_per_byte"] == pytest.approx(8 * coded.stat().st_size / found["bytes"])
    stderr = found["bound_bits_per_byte_stderr"]
    assert abs(found["model_bits_per_byte"] - found["bound_bits_per_byte"]) < 5 * stderr < 0.1
    decode = ("certify", trained.name, "--decode", str(coded), "--out", str(back))
    assert commands.result_of(commands.nanodlm(*decode, *where))["bytes"] == found["bytes"]
    assert back.read_bytes() == text.read_bytes()
    held_out = commands.result_of(commands.nanodlm("certify", trained.name, "--steps", "4", *where))
    assert held_out["tokens"] == 5000  # all that there is


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["certify", "TEXT", "--out", "none/here"], "cannot write none/here: there is no folder none"),
        (["score", "TEXT", "--per_document", "none/here"], "cannot write none/here: there is no folder none"),
        (["certify", "a-run", "TEXT", "--decode", "TEXT"], "name a text to code, or --decode a file, not both"),
        (["certify", "TEXT"], "holds no trained model"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = [str(tmp_path / "text.txt") if word == "TEXT" else word for word in words]
    with pytest.raises(SystemExit):
        main([*words, "--store", str(tmp_path / "store")])
    assert says in capsys.readouterr().err
