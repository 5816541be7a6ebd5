"""Settings become a network and an objective here, and nowhere else."""

import tiktoken
from flax import nnx

from nanodlm.config import Config
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.model.transformer import Transformer


def padded_vocab_size(encoding: tiktoken.Encoding) -> int:
    """Ids of the model: the encoding's, the mask, and padding up to a multiple of 128.

    >>> from nanodlm.data.tokenizer import gpt2
    >>> padded_vocab_size(gpt2())
    50304
    """
    return -(-(encoding.n_vocab + 1) // 128) * 128


def make_model(config: Config, encoding: tiktoken.Encoding) -> Transformer:
    """A freshly initialised network for a configuration and a tokenizer."""
    shape = {**config.model.model_dump(exclude={"init_seed", "seq_len"}), "remat": config.train.remat}
    block_size = {"block": config.objective.block_size, "autoregressive": 1}.get(config.objective.kind, 0)
    rngs = nnx.Rngs(config.model.init_seed)
    return Transformer(vocab_size=padded_vocab_size(encoding), block_size=block_size, **shape, rngs=rngs)


def make_objective(config: Config, encoding: tiktoken.Encoding) -> Objective:
    """The objective that a configuration trains on."""
    schedule = make_schedule(**config.schedule.model_dump())
    masks = config.objective.kind in ("absorbing", "block")
    estimator = config.objective.estimator or ("constant_count" if masks else "count")
    chosen = {**config.objective.model_dump(), "estimator": estimator}
    return Objective(schedule, encoding.n_vocab, **chosen)
