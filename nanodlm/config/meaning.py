"""Which settings determine a result: those that something reads, beside the others.

A setting that nothing reads, such as the exponent of a linear schedule, is no part of what was done: results count as
made with its default, so that changing it builds nothing again.
"""

from typing import Any

from nanodlm.config.differences import flat
from nanodlm.config.settings import Config
from nanodlm.diffusion.kinds import KINDS


def unread(config: Config) -> dict[str, Any]:
    """Return the settings that nothing reads beside the others, but that differ from their defaults."""
    objective, schedule, train, sample = config.objective, config.schedule, config.train, config.sample
    kind = KINDS[objective.kind]
    noisy = kind.masks or kind.random_tokens
    estimator = objective.estimator or kind.estimators[0]
    sampler = sample.sampler or kind.samplers[0]
    steps = noisy and sampler != "first_hitting"
    read = {
        "data.variable_share": config.data.rows == "document",
        "data.isolate_documents": config.data.rows == "stream",
        "schedule.kind": noisy,
        "schedule.exponent": noisy and schedule.kind == "poly",
        "schedule.eps": noisy and (schedule.kind == "loglinear" or schedule.kind.endswith("_clipped")),
        "objective.estimator": estimator != kind.estimators[0],
        "objective.num_timesteps": estimator == "discrete",
        "objective.block_size": kind.reads == "block",
        "objective.uniform_share": kind.masks and kind.random_tokens,
        "objective.times": noisy,
        "objective.weighting": noisy,
        "objective.max_weight": noisy and objective.weighting == "clipped",
        "train.muon_lr": train.optimizer == "muon",
        "train.min_lr": train.lr_schedule in ("warmup_cosine", "warmup_stable_decay"),
        "train.warmup_steps": train.lr_schedule != "none",
        "train.cooldown_steps": train.lr_schedule == "warmup_stable_decay",
        "eval.repeats": noisy,
        "eval.seed": noisy,
        "eval.precision": noisy,
        "sample.num_steps": steps,
        "sample.grid": steps and sampler not in ("entropy", "threshold"),
        "sample.top_k": sample.temperature > 0,
        "sample.top_p": sample.temperature > 0,
        "sample.guidance": bool(sample.prompt),
        "sample.entropy_bound": sampler == "entropy",
        "sample.threshold": sampler == "threshold",
        "sample.remask": sampler in ("remdm_cap", "remdm_rescale", "remdm_loop"),
        "sample.loop_time": sampler == "remdm_loop",
    }
    now, default = flat(config.model_dump()), flat(Config().model_dump())
    return {name: now[name] for name, is_read in read.items() if not is_read and now[name] != default[name]}


def as_read(config: Config) -> Config:
    """Return a configuration in which what nothing reads has its default."""
    settings, default = config.model_dump(), Config().model_dump()
    for name in unread(config):
        group, field = name.split(".")
        settings[group][field] = default[group][field]
    return Config.model_validate(settings)


def schedule_trains(config: Config) -> bool:
    """Return whether training reads the schedule: counts draw no times, and most networks are told none."""
    estimator = config.objective.estimator or KINDS[config.objective.kind].estimators[0]
    return config.model.time_conditioning or estimator not in ("count", "constant_count")


def training_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine what training makes of its data, by group."""
    config = as_read(config)
    if not schedule_trains(config):
        config = config.replace(schedule=Config().schedule.model_dump())
    without = {"fsdp", "tensor", "remat"}  # these change where and how it is computed, not what comes out
    train = config.train.model_dump(exclude=without if config.train.skip_nonfinite else {*without, "skip_nonfinite"})
    data = config.data.model_dump(include={"shuffle_seed", "isolate_documents"})
    return {**config.model_dump(include={"model", "schedule", "objective"}), "train": train, "data": data}


def evaluation_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine what a network's bound is measured as, but for the sets."""
    return as_read(config).eval.model_dump(exclude={"sets"})


def sampling_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine what is sampled from a network: those of `sample`, and another schedule."""
    config = as_read(config)
    other = config.schedule != Config().schedule and not schedule_trains(config)
    own = config.sample.model_dump(exclude={"judge", "mauve"})
    own["sampler"] = own["sampler"] or KINDS[config.objective.kind].samplers[0]
    return own | ({"schedule": config.schedule.model_dump()} if other else {})


def twin(config: Config) -> Config:
    """Return the configuration of the autoregressive network of the same sizes and tokens, which can judge samples."""
    name = f"{config.exp.run_name}-twin".removeprefix("-")
    return config.replace(
        objective={"kind": "autoregressive", "estimator": None},
        sample={"sampler": None, "guidance": 0.0, "judge": "", "mauve": False},
        exp={"run_name": name, "resume_path": "", "allow_changed": ()},
    )


def is_twin(run_name: str) -> bool:
    """Say if a run of this name was made by `twin`.

    >>> is_twin("twin"), is_twin("mine-twin"), is_twin("")
    (True, True, False)
    """
    return f"-{run_name}".endswith("-twin")
