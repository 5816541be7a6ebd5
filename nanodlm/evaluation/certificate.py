"""The bound, proven by compression: a text is coded with a network's own conditionals, and comes back bit for bit.

The file holds a seed, from which the order is drawn in which tokens are told, and what an arithmetic coder makes of
their probabilities; its length is the bound but for chance, which `certify` tells. Encoder and decoder make the same
calls, of the same shapes, of one compiled program: on one machine their probabilities are equal to the last bit.
"""

import hashlib
import math
import struct
import zlib
from typing import Any

import numpy as np
import tiktoken
from flax import nnx

from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import parse_address
from nanodlm.data.documents import Documents
from nanodlm.data.rows import read
from nanodlm.data.tokenizer import token_sizes, tokenise
from nanodlm.errors import Emit, NanodlmError, UsageError
from nanodlm.evaluation.orders import Tokens, bound_nats, random_order, walk
from nanodlm.model.transformer import Transformer
from nanodlm.store import Store

try:
    from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    raise UsageError("certify needs an arithmetic coder: pip install -c constraints.txt -e '.[certify]'") from error

HEADER = struct.Struct("<8s32s32sIIQ")  # magic, sha256 of parameters and of the text, seed, group, number of tokens
MAGIC = b"nanodlm\x01"
HELD_OUT = 100_000  # bytes of the held-out text that are coded
DRAWS = 16  # of noise, for the bound
FAMILY = stream.model.Categorical(perfect=False)  # each token has at least one of 2^24 parts


def tokens_of(encoding: tiktoken.Encoding, text: bytes) -> Tokens:
    """Return the tokens of a text, as one document with a mark at its end."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the text is not UTF-8, from byte {error.start:,} on: convert it, with iconv") from error
    if not text:
        raise UsageError("the text is empty: nothing can be said of it")
    return tokenise(encoding, Documents(np.frombuffer(text, np.uint8), np.array([0, len(text)]))).values


def held_out(encoding: tiktoken.Encoding, address: str) -> Tokens:
    """Return the first rows, of about 100 kB, of what the run of a model held out."""
    store = parse_address(address).store
    artifact = Store(store).open(address) if store else None  # an exported folder is of none
    if artifact is None or "shard" not in dict(artifact.inputs):
        raise UsageError(f"{address} names no held-out text: name a FILE")
    shard = artifact.store.open(f"shard/{dict(artifact.inputs)['shard']}")
    rows = read(shard.file("validation.arrayrecord"), shard.metrics["dtype"])
    sizes = token_sizes(encoding)[:, 0]
    filled = np.cumsum([sizes[row[row < encoding.n_vocab]].sum() for row in rows])
    tokens = np.concatenate(rows[: 1 + np.searchsorted(filled, HELD_OUT)])
    return tokens[tokens < encoding.n_vocab]  # without padding


def compress(
    network: Transformer, encoding: tiktoken.Encoding, tokens: Tokens, *, group: int, seed: int, emit: Emit
) -> tuple[bytes, dict[str, Any]]:
    """Return the file of a text, and how its length compares with the bound, drawn for the same rows.

    Only the order and the noise that were drawn set them apart. So a row's difference is 0 on average, and
    the standard error of its sum is the root of the sum of its squares.
    """
    coder = stream.queue.RangeEncoder()

    def tell(places: np.ndarray, log_p: np.ndarray) -> np.ndarray:
        coder.encode(tokens[places].ravel().astype(np.int32), FAMILY, np.exp(log_p).reshape(places.size, -1))
        return tokens[places]

    _, nats = walk(network, len(tokens), tell, random_order(network, seed), group=group, emit=emit)
    text = text_of(encoding, tokens)
    sha256 = bytes.fromhex(parameters_sha256(nnx.state(network))), hashlib.sha256(text).digest()
    data = HEADER.pack(MAGIC, *sha256, seed, group, len(tokens)) + coder.get_compressed().astype("<u4").tobytes()
    data += zlib.crc32(data).to_bytes(4, "little")
    bound = bound_nats(network, tokens, group=group, draws=DRAWS, seed=seed)
    difference = np.add.reduceat(nats, np.arange(0, len(tokens), network.seq_len)) - bound
    bits_per_byte = 1 / math.log(2) / len(text)
    return data, {
        "bytes": len(text),
        "tokens": len(tokens),
        "rows": len(bound),
        "file_bytes": len(data),
        "header_bytes": HEADER.size + 4,
        "bits_per_byte": 8 * len(data) / len(text),
        "model_bits_per_byte": nats.sum() * bits_per_byte,
        "bound_bits_per_byte": bound.sum() * bits_per_byte,
        "bound_bits_per_byte_stderr": float(np.linalg.norm(difference)) * bits_per_byte,
    }


def decompress(network: Transformer, encoding: tiktoken.Encoding, data: bytes, emit: Emit) -> bytes:
    """Return the text of a file that `compress` made; a file, model or text that is not the same is a NanodlmError."""
    if data[:8] != MAGIC or len(data) % 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise NanodlmError("the file is damaged, or none that `nanodlm certify` wrote: write it again with --out")
    _, parameters, sha256, seed, group, n_tokens = HEADER.unpack_from(data)
    if parameters.hex() != parameters_sha256(nnx.state(network)):
        what = f"the file was made with another model, whose parameters_sha256 is {parameters.hex()[:16]}…"
        raise NanodlmError(f"{what}: name that one (`nanodlm show` tells it)")
    coder = stream.queue.RangeDecoder(np.frombuffer(data[HEADER.size : -4], "<u4").astype(np.uint32))

    def tell(places: np.ndarray, log_p: np.ndarray) -> np.ndarray:
        return coder.decode(FAMILY, np.exp(log_p).reshape(places.size, -1)).reshape(places.shape)

    tokens, _ = walk(network, n_tokens, tell, random_order(network, seed), group=group, emit=emit)
    if hashlib.sha256(text := text_of(encoding, tokens)).digest() != sha256:
        raise NanodlmError("another text came out: decode where it was coded, with the same packages and processors")
    return text


def text_of(encoding: tiktoken.Encoding, tokens: Tokens) -> bytes:
    """Return the bytes of tokens, of which end-of-text marks have none."""
    return encoding.decode_bytes(tokens[tokens != encoding.eot_token].tolist())
