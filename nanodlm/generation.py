"""The sample stage: texts from a trained model."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanodlm import samplers, tokenizer
from nanodlm.checkpoint import load_folder
from nanodlm.config import Config, load_config
from nanodlm.errors import UsageError
from nanodlm.schedules import make_schedule
from nanodlm.store import Artifact, Attempt


def generate(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None] = lambda *_, **__: None
) -> dict[str, Any]:
    """Stage: draw `sample.num_samples` rows of the model's length; write `samples.txt`, `.jsonl` and `tokens.npy`.

    Raises:
        UsageError: When the prompt leaves no room to write.
    """
    options = config.sample
    run = inputs["train"].local()
    trained = load_config(str(run / "config.json"))
    model, encoding = load_folder(run)
    length = trained.model.seq_len
    prompt = np.array(encoding.encode_ordinary(options.prompt), np.int32)
    if len(prompt) >= length:
        raise UsageError(f"the prompt has {len(prompt)} tokens and rows have {length}: shorten --sample.prompt")
    draw = jax.jit(
        partial(
            samplers.sample,
            model,
            shape=(options.num_samples, length),
            mask_id=encoding.n_vocab,
            schedule=make_schedule(trained.schedule.kind, exponent=trained.schedule.exponent),
            num_steps=options.num_steps,
            sampler=options.sampler,
            temperature=options.temperature,
            prompt=jnp.asarray(prompt) if len(prompt) else None,
        )
    )
    tokens = np.asarray(draw(jax.random.key(options.seed)))
    texts = [encoding.decode(row.tolist()) for row in tokens]
    emit("progress", done=len(texts), total=len(texts), unit="samples")
    np.save(attempt.path / "tokens.npy", tokens)
    (attempt.path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rule = "\n" + "-" * 72 + "\n"
    (attempt.path / "samples.txt").write_text(rule.join(text.replace(tokenizer.END_OF_TEXT, "\n\n") for text in texts))
    return {"samples": len(texts), "sample_tokens": int(tokens.size), "first_sample": texts[0]}
