"""The sample stage: texts from a trained model."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Int, Key

from nanodlm.build import make_objective
from nanodlm.config import Config, SampleConfig, load_config
from nanodlm.data.tokenizer import END_OF_TEXT
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.blocks import Decoder, sample_autoregressive, sample_blocks
from nanodlm.diffusion.sampling import sample
from nanodlm.errors import UsageError
from nanodlm.model.transformer import Transformer

if TYPE_CHECKING:
    from nanodlm.store import Artifact, Attempt


def generate(
    config: Config, inputs: dict[str, "Artifact"], attempt: "Attempt", emit: Callable[..., None]
) -> dict[str, Any]:
    """Draw `sample.num_samples` texts and write them to `samples.txt`, `samples.jsonl` and `tokens.npy`.

    Raises:
        UsageError: When the prompt is as long as the texts.
    """
    from nanodlm.checkpoints.loading import load_artifact  # `make_draw` is timed where no store can be opened

    options = config.sample
    model, encoding = load_artifact(inputs["train"])
    trained = load_config(str(inputs["train"].file("config.json")))
    graphdef, params = nnx.split(model)
    draw = make_draw(options, trained, encoding, graphdef)
    tokens = np.asarray(draw(params, jax.random.key(options.seed)))
    texts = [encoding.decode(row.tolist()) for row in tokens]
    emit("progress", done=len(texts), total=len(texts), unit="samples")
    np.save(attempt.path / "tokens.npy", tokens)
    (attempt.path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rule = "\n" + "-" * 72 + "\n"
    (attempt.path / "samples.txt").write_text(rule.join(text.replace(END_OF_TEXT, "\n\n") for text in texts))
    return {"samples": len(texts), "sample_tokens": int(tokens.size), "first_sample": texts[0]}


def make_draw(
    options: SampleConfig, trained: Config, encoding: tiktoken.Encoding, graphdef: nnx.GraphDef
) -> jax.stages.Wrapped:
    """Return a jitted function `(params, key) -> tokens` that draws texts, int32 of shape (num_samples, length).

    The sampler is the one of the objective that the network, whose structure is `graphdef`, was trained on. A network
    of blocks looks back no further than in training.

    Raises:
        UsageError: When the prompt is as long as the texts.
    """
    length = options.length or trained.model.seq_len
    prompt = np.array(encoding.encode_ordinary(options.prompt), np.int32)
    vocabulary = Vocabulary.of(encoding)
    objective = make_objective(trained, vocabulary)
    size = objective.traits.block_size(objective.block_size)
    if len(prompt) >= length:
        remedy = "shorten --sample.prompt" + " or raise --sample.length" * bool(size)
        raise UsageError(f"the prompt has {len(prompt)} tokens and texts have {length}: {remedy}")
    window = cache_window(trained.model.seq_len, size)
    document_end = vocabulary.end_of_text if trained.data.isolate_documents else None
    choice = options.model_dump(include={"temperature", "top_k", "top_p"})
    steps = options.model_dump(include={"num_steps", "sampler", "grid", "entropy_bound", "remask", "loop_time"})

    @jax.jit
    def draw(params: Any, key: Key[Array, ""]) -> Int[Array, "B L"]:
        model: Transformer = nnx.merge(graphdef, params)
        common = {**choice, "mask_id": objective.mask_id, "prompt": jnp.asarray(prompt)}
        if not size:
            kind = {"uniform_share": objective.noise_share, "guidance": options.guidance}
            shape = (options.num_samples, length)
            return sample(model, key, shape=shape, schedule=objective.schedule, **kind, **common, **steps)
        decoder = Decoder(lambda rows: model.new_cache(rows, window), model.extend, model.denoise_block)
        shape = (options.num_samples, -(-length // size) * size)  # the text may end within the last block
        if objective.traits.reads == "before":
            return sample_autoregressive(decoder, key, shape=shape, document_end=document_end, **common)
        blocks = {"block_size": size, "schedule": objective.schedule}
        return sample_blocks(decoder, key, shape=shape, **blocks, **common, **steps)[:, :length]

    return draw


def cache_window(seq_len: int, block_size: int) -> int:
    """Return how many tokens before a block it reads: whole blocks, no more than in training.

    >>> cache_window(64, 16), cache_window(64, 1)
    (48, 63)
    """
    return max(1, seq_len // max(1, block_size) - 1) * block_size
