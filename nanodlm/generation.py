"""The sample stage: texts from a trained model."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from nanodlm import samplers, tokenizer
from nanodlm.checkpoint import load_folder, make_objective
from nanodlm.config import Config, SampleConfig, load_config
from nanodlm.errors import UsageError
from nanodlm.losses import Objective
from nanodlm.model import Transformer
from nanodlm.store import Artifact, Attempt


def generate(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None] = lambda *_, **__: None
) -> dict[str, Any]:
    """Stage: draw `sample.num_samples` texts; write `samples.txt`, `.jsonl` and `tokens.npy`.

    Raises:
        UsageError: When the prompt leaves no room to write.
    """
    options = config.sample
    run = inputs["train"].local()
    trained = load_config(str(run / "config.json"))
    model, encoding = load_folder(run)
    length = options.length or trained.model.seq_len
    prompt = np.array(encoding.encode_ordinary(options.prompt), np.int32)
    if len(prompt) >= length:
        remedy = "shorten --sample.prompt"
        if model.block_size:
            remedy += " or raise --sample.length"
        raise UsageError(f"the prompt has {len(prompt)} tokens and texts have {length}: {remedy}")
    window = max(1, trained.model.seq_len // max(1, model.block_size) - 1) * model.block_size
    document_end = encoding.n_vocab - 1 if trained.data.isolate_documents else None
    objective = make_objective(trained, encoding)
    draw = jax.jit(partial(_draw, config.sample, objective, model, length, window, document_end))
    tokens = np.asarray(draw(jax.random.key(options.seed), jnp.asarray(prompt)))
    texts = [encoding.decode(row.tolist()) for row in tokens]
    emit("progress", done=len(texts), total=len(texts), unit="samples")
    np.save(attempt.path / "tokens.npy", tokens)
    (attempt.path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rule = "\n" + "-" * 72 + "\n"
    (attempt.path / "samples.txt").write_text(rule.join(text.replace(tokenizer.END_OF_TEXT, "\n\n") for text in texts))
    return {"samples": len(texts), "sample_tokens": int(tokens.size), "first_sample": texts[0]}


def _draw(
    options: SampleConfig,
    objective: Objective,
    model: Transformer,
    length: int,
    window: int,
    document_end: int | None,
    key: Key[Array, ""],
    prompt: Int[Array, "P"],
) -> Int[Array, "B L"]:
    """Token ids from the sampler of the objective that the model was trained on.

    A network of blocks looks back over `window` tokens, no further than in training.
    """
    common = {
        "mask_id": objective.mask_id,
        "prompt": prompt,
        **options.model_dump(include={"temperature", "top_k", "top_p"}),
    }
    steps = {
        "schedule": objective.schedule,
        **options.model_dump(include={"num_steps", "sampler", "grid", "entropy_bound", "remask", "loop_time"}),
    }
    size = model.block_size
    if not size:
        kind = {"uniform_share": objective.noise_share, "guidance": options.guidance}
        return samplers.sample(model, key, shape=(options.num_samples, length), **kind, **common, **steps)
    decoder = samplers.Decoder(lambda rows: model.new_cache(rows, window), model.extend, model.denoise_block)
    shape = (options.num_samples, -(-length // size) * size)  # the text may end within the last block
    if objective.kind == "autoregressive":
        return samplers.sample_autoregressive(decoder, key, shape=shape, document_end=document_end, **common)
    return samplers.sample_blocks(decoder, key, shape=shape, block_size=size, **common, **steps)[:, :length]
