"""The sample stage: texts from a trained model."""

import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Int, Key

from nanodlm.config import Config, SampleConfig
from nanodlm.data.tokenizer import END_OF_TEXT
from nanodlm.diffusion.sampling import sample
from nanodlm.diffusion.schedules import Schedule, make_schedule
from nanodlm.errors import Emit, NanodlmError, UsageError
from nanodlm.model.transformer import Transformer

if TYPE_CHECKING:
    from nanodlm.store import Artifact, Attempt


def generate(config: Config, inputs: dict[str, "Artifact"], attempt: "Attempt", emit: Emit) -> dict[str, Any]:
    """Draw `sample.num_samples` texts and write them to `samples.txt`, `samples.jsonl` and `tokens.npy`."""
    from nanodlm.checkpoints.loading import load_artifact  # `make_draw` is timed where no store can be opened
    from nanodlm.evaluation.judge import measured

    options = config.sample
    model, encoding = load_artifact(inputs["train"])
    schedule = make_schedule(**config.schedule.model_dump())
    tokens = np.asarray(make_draw(options, encoding, model, schedule)(nnx.state(model), jax.random.key(options.seed)))
    if tokens.min() < 0:
        raise NanodlmError("the network gave logits that are not finite: its training has diverged")
    rows, end = tokens.tolist(), encoding.eot_token
    if config.data.rows != "stream":  # a text is one document: what follows its mark means nothing
        rows = [row[: [*row, end].index(end)] for row in rows]
    texts = [encoding.decode(row) for row in rows]
    emit("progress", done=len(texts), total=len(texts), unit="samples")
    np.save(attempt.path / "tokens.npy", tokens)
    (attempt.path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shown = [text.replace(END_OF_TEXT, "\n\n") for text in texts]
    (attempt.path / "samples.txt").write_text(f"\n{'-' * 72}\n".join(shown))
    counts = {"samples": len(texts), "sample_tokens": int(tokens.size), "first_sample": shown[0]}
    return counts | measured(config, inputs["shard"], tokens, encoding)


def make_draw(
    options: SampleConfig, encoding: tiktoken.Encoding, model: Transformer, schedule: Schedule
) -> jax.stages.Wrapped:
    """Return a jitted function `(params, key) -> tokens` that draws texts, int32 of shape (num_samples, length).

    The parameters are what `nnx.state` gives of the model. The schedule must be its own if it is told the time.
    """
    length = options.length or model.seq_len
    prompt = np.array(encoding.encode_ordinary(options.prompt), np.int32)
    if len(prompt) >= length:
        remedy = "shorten --sample.prompt" + " or raise --sample.length" * bool(model.block_size)
        raise UsageError(f"the prompt has {len(prompt)} tokens and texts have {length}: {remedy}")
    how: dict[str, Any] = options.model_dump(exclude={"prompt", "length", "num_samples", "seed", "judge"})
    graphdef = nnx.graphdef(model)

    def draw(params: Any, key: Key[Array, ""]) -> Int[Array, "B L"]:
        model, shape = nnx.merge(graphdef, params), (options.num_samples, length)
        return sample(model, key, shape=shape, schedule=schedule, prompt=prompt, **how)

    return jax.jit(draw)
