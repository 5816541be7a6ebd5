"""The sample stage: texts from a trained model."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Key

from nanodlm.config import Config, SampleConfig, SamplerConfig
from nanodlm.data.tokenizer import END_OF_TEXT
from nanodlm.diffusion.sampling import reverse_process
from nanodlm.diffusion.schedules import Schedule, make_schedule
from nanodlm.diffusion.walks import Walk, step_by_step, to_end
from nanodlm.errors import Emit, NanodlmError, UsageError
from nanodlm.model.transformer import Transformer

if TYPE_CHECKING:
    from nanodlm.store import Artifact, Attempt

WATCHED, LONG = 3, 1024  # texts whose steps are kept, and tokens of each


def generate(config: Config, inputs: dict[str, "Artifact"], attempt: "Attempt", emit: Emit) -> dict[str, Any]:
    """Draw `sample.num_samples` texts and write them to `samples.txt`, `samples.jsonl` and `tokens.npy`.

    The steps of the first ones are in `steps.json`, as `watch.Recording`s, and in `slider.html`, for a page to hold.
    """
    from nanodlm.checkpoints.loading import load_artifact  # `make_draw` is timed where no store can be opened
    from nanodlm.evaluation.judge import measured
    from nanodlm.generation.slider import fragment
    from nanodlm.generation.watch import record

    options = config.sample
    model, encoding = load_artifact(inputs["train"])
    schedule = make_schedule(**config.schedule.model_dump())
    walk = step_by_step(make_walk(options, encoding, model, schedule))
    total = calls_of(options, model)
    frames, tokens = [], np.zeros((0, 0), np.int32)
    try:
        for state in walk(nnx.state(model), jax.random.key(options.seed)):
            tokens = np.asarray(state.tokens)
            frames.append((tokens[:WATCHED], np.asarray(state.confidence[:WATCHED])))
            emit("progress", done=int(state.calls), total=total, unit="calls of the network")
    except ValueError as error:
        raise NanodlmError("the network gave logits that are not finite: its training has diverged") from error
    rows, end = tokens.tolist(), encoding.eot_token
    if config.data.rows != "stream":  # a text is one document: what follows its mark means nothing
        rows = [row[: [*row, end].index(end)] for row in rows]
    texts = [encoding.decode(row) for row in rows]
    recordings = [record(frames, i, min(len(row), LONG), encoding) for i, row in enumerate(rows[:WATCHED])]
    np.save(attempt.path / "tokens.npy", tokens)
    (attempt.path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shown = [text.replace(END_OF_TEXT, "\n\n") for text in texts]
    (attempt.path / "samples.txt").write_text(f"\n{'-' * 72}\n".join(shown))
    (attempt.path / "steps.json").write_text(json.dumps([recording._asdict() for recording in recordings]))
    (attempt.path / "slider.html").write_text(fragment(recordings))
    counts = {"samples": len(texts), "sample_tokens": int(tokens.size), "first_sample": shown[0]}
    return counts | measured(config, inputs["shard"], tokens, encoding)


def calls_of(options: SampleConfig, model: Transformer) -> int | None:
    """Return how often texts of whole rows call the network; None where it depends on what is drawn, or is kept."""
    traits = model.objective.traits
    sampler = options.sampler or traits.samplers[0]
    varies = sampler in ("ancestral_skip", "first_hitting", "spread", "entropy", "threshold")
    depends = varies or options.cache_block or traits.reads != "row"
    return None if depends else options.num_steps * (1 + bool(options.guidance))


def make_walk(
    options: SampleConfig, encoding: tiktoken.Encoding, model: Transformer, schedule: Schedule
) -> Callable[[Any, Key[Array, ""]], Walk]:
    """Return a function `(params, key) -> walk` whose end is texts, int32 of shape (num_samples, length).

    The parameters are what `nnx.state` gives of the model. The schedule must be its own if it is told the time.
    """
    length = options.length or model.seq_len
    prompt = np.array(encoding.encode_ordinary(options.prompt), np.int32)
    if len(prompt) >= length:
        remedy = "shorten --sample.prompt" + " or raise --sample.length" * bool(model.block_size)
        raise UsageError(f"the prompt has {len(prompt)} tokens and texts have {length}: {remedy}")
    how: dict[str, Any] = options.model_dump(include={*SamplerConfig.model_fields})
    how["sampler"] = options.sampler or model.objective.traits.samplers[0]
    graphdef = nnx.graphdef(model)

    def walk(params: Any, key: Key[Array, ""]) -> Walk:
        model, shape = nnx.merge(graphdef, params), (options.num_samples, length)
        return reverse_process(model, key, shape=shape, schedule=schedule, prompt=prompt, **how)

    return walk


def make_draw(
    options: SampleConfig, encoding: tiktoken.Encoding, model: Transformer, schedule: Schedule
) -> jax.stages.Wrapped:
    """Return a jitted function `(params, key) -> tokens` that takes the walk of `make_walk` to its end, in one loop."""
    walk = make_walk(options, encoding, model, schedule)
    return jax.jit(lambda params, key: to_end(walk(params, key)).tokens)
