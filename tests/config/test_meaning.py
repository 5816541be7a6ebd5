"""Settings that nothing reads are no part of what was done."""

from typing import Any

import pytest

from nanodlm.config import PRESETS, Config, evaluation_settings, sampling_settings, training_settings, unread

DEMO = PRESETS["demo"]


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ({"schedule": {"exponent": 3.0, "eps": 0.01}}, ["schedule.exponent", "schedule.eps"]),
        ({"schedule": {"kind": "poly", "exponent": 3.0}}, []),
        ({"schedule": {"kind": "loglinear", "eps": 0.01}}, []),
        ({"objective": {"num_timesteps": 50, "block_size": 4, "uniform_share": 0.2, "max_weight": 3.0}}, [
            "objective.num_timesteps", "objective.block_size", "objective.uniform_share", "objective.max_weight",
        ]),
        ({"objective": {"estimator": "discrete", "num_timesteps": 50, "weighting": "clipped", "max_weight": 3.0}}, []),
        ({"objective": {"estimator": "constant_count"}}, ["objective.estimator"]),
        ({"data": {"variable_share": 0.5, "isolate_documents": True}}, ["data.variable_share"]),
        ({"data": {"rows": "packed", "isolate_documents": True}}, ["data.isolate_documents"]),
        ({"data": {"rows": "document", "variable_share": 0.5}}, []),
        ({"objective": {"kind": "autoregressive"}, "schedule": {"kind": "cosine"}, "sample": {"num_steps": 9}}, [
            "schedule.kind", "objective.weighting", "sample.num_steps",
        ]),
        ({"objective": {"kind": "autoregressive", "weighting": "bound"}, "eval": {"repeats": 3, "seed": 1}}, [
            "eval.repeats", "eval.seed",
        ]),
        ({"train": {"optimizer": "adamw", "muon_lr": 0.5}}, ["train.muon_lr"]),
        ({"train": {"lr_schedule": "none", "warmup_steps": 9, "min_lr": 1e-4}}, [
            "train.min_lr", "train.warmup_steps", "train.cooldown_steps",
        ]),
        ({"sample": {"sampler": "first_hitting", "num_steps": 9, "grid": "cosine"}}, [
            "sample.num_steps", "sample.grid",
        ]),
        ({"sample": {"temperature": 0.0, "top_k": 5, "guidance": 1.0, "remask": 0.5}}, [
            "sample.top_k", "sample.guidance", "sample.remask",
        ]),
        ({"sample": {"sampler": "threshold", "threshold": 0.5, "grid": "cosine"}}, ["sample.grid"]),
        ({"sample": {"threshold": 0.5, "cache_block": 16}}, ["sample.threshold"]),
        ({"sample": {"sampler": "remdm_loop", "remask": 0.5, "loop_time": 0.2, "prompt": "We", "guidance": 1.0}}, []),
    ],
)  # fmt: skip
def test_what_nothing_reads_changes_no_result(groups: dict[str, Any], names: list[str]) -> None:
    config = DEMO.replace(**groups)
    assert list(unread(config)) == names
    defaults: dict[str, Any] = {}
    for name in names:
        group, field = name.split(".")
        defaults.setdefault(group, {})[field] = getattr(getattr(Config(), group), field)
    for settings in (training_settings, evaluation_settings, sampling_settings):
        assert settings(config) == settings(config.replace(**defaults))


def test_a_schedule_that_counts_do_not_read_trains_nothing_again_but_samples_anew() -> None:
    cosine = {"schedule": {"kind": "cosine"}}
    assert training_settings(DEMO.replace(**cosine)) == training_settings(DEMO)
    assert sampling_settings(DEMO.replace(**cosine)) != sampling_settings(DEMO)
    for reads in ({"model": {"time_conditioning": True}}, {"objective": {"estimator": "continuous"}}):
        plain = DEMO.replace(**reads)
        assert training_settings(plain.replace(**cosine)) != training_settings(plain)
        assert sampling_settings(plain.replace(**cosine)) == sampling_settings(plain), "its own network is sampled"


def test_what_is_read_is_part_of_the_identity() -> None:
    for groups in ({"train": {"lr": 0.5}}, {"objective": {"weighting": "bound"}}, {"model": {"d_model": 64}}):
        assert training_settings(DEMO.replace(**groups)) != training_settings(DEMO)
    assert sampling_settings(DEMO.replace(sample={"top_k": 5})) != sampling_settings(DEMO)


def test_a_sampler_that_is_taken_where_none_is_named_is_part_of_what_is_sampled() -> None:
    for kind, own in (("autoregressive", "ancestral"), ("uniform", "ancestral"), ("absorbing", "spread")):
        config = DEMO.replace(objective={"kind": kind})
        assert sampling_settings(config) == sampling_settings(config.replace(sample={"sampler": own}))
        assert sampling_settings(config)["sampler"] == own
