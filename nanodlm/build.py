"""Settings become a network and an objective here, and nowhere else."""

import jax
from flax import nnx

from nanodlm.config import Config, SamplerConfig
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.kinds import KINDS
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.model.transformer import Transformer
from nanodlm.precision import measured


def make_model(config: Config, vocabulary: Vocabulary, seed: int | None = None) -> Transformer:
    """Return a freshly initialised network for the ids of a vocabulary, which carries what it is to be trained on."""
    config = measured(config)
    shape = {**config.model.model_dump(exclude={"init_seed", "seq_len"}), "remat": config.train.remat}
    block_size = KINDS[config.objective.kind].block_size(config.objective.block_size)
    rngs = nnx.Rngs(jax.random.key(config.model.init_seed if seed is None else seed))
    model = Transformer(vocab_size=vocabulary.padded_size, block_size=block_size, **shape, rngs=rngs)
    model.objective, model.seq_len = make_objective(config, vocabulary), config.model.seq_len
    model.sampling = SamplerConfig(**config.sample.model_dump(include=set(SamplerConfig.model_fields)))
    rows = config.data.rows
    apart = rows == "packed" or (rows == "stream" and config.data.isolate_documents)
    model.document_end = vocabulary.end_of_text if apart else None
    model.padding = None if rows == "stream" else vocabulary.mask_id
    return model


def make_objective(config: Config, vocabulary: Vocabulary) -> Objective:
    """Return the objective that a configuration trains on; without an estimator, with the first of its kind's."""
    estimator = config.objective.estimator or KINDS[config.objective.kind].estimators[0]
    chosen = {**config.objective.model_dump(), "estimator": estimator}
    return Objective(make_schedule(**config.schedule.model_dump()), vocabulary.mask_id, **chosen)
