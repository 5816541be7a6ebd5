"""The benches of speed: their formulae, their fields, what they import. Speed itself is never asserted."""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanodlm.bench import flops as bench_flops
from nanodlm.bench import speed
from nanodlm.build import make_model
from nanodlm.config import PRESETS, Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import UsageError
from nanodlm.generation import generate
from nanodlm.model.transformer import Transformer
from tests.support.commands import environment


def tiny(**groups: dict[str, Any]) -> Config:
    base = PRESETS["demo"].replace(
        data={"tokenizer": "bytes"},
        model={"seq_len": 8, "n_layers": 1, "n_heads": 2, "d_model": 16, "d_ff": 32},
        train={"batch_size": 4, "grad_acc_steps": 2},
        sample={"num_samples": 2, "num_steps": 3},
    )
    return base.replace(**groups)


def test_training_flops_are_those_of_a_hand_count() -> None:
    config = Config().replace(model={"seq_len": 1024, "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072})
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    attention = 12 * 12 * 768 * 1024
    whole = 6 * (matrices + 768 * 50304) + attention
    assert bench_flops.flops_per_token(config, 50304) == whole
    half = 1025 / 2 / 1024
    assert bench_flops.flops_per_token(config, 50304, output_share=half) == pytest.approx(
        whole - 6 * 768 * 50304 * (1 - half)
    )
    causal = config.replace(objective={"kind": "autoregressive"})
    assert bench_flops.flops_per_token(causal, 50304) == pytest.approx(whole - attention * (1 - half))


def test_a_block_network_also_reads_the_clean_row_but_for_what_its_last_layer_makes_of_it() -> None:
    d, d_ff, length, size = 16, 32, 8, 2
    config = tiny(model={"n_layers": 3}, objective={"kind": "block", "block_size": size})
    layer = 6 * (4 * d * d + 2 * d * d_ff)
    attention = 12 * d * (length + size) / 2  # of its own block and those before
    keys_and_values = 6 * 2 * d * d
    by_hand = 5 * (layer + attention) + keys_and_values + 6 * d * 384
    assert bench_flops.flops_per_token(config, 384) == pytest.approx(by_hand)


def test_forward_flops_are_those_that_xla_counts() -> None:
    config = tiny(model={"d_model": 128, "n_heads": 4, "d_ff": 512, "seq_len": 64, "conv_width": 0})
    outputs = bench_flops.vocab_size(config)
    model = make_model(config, Vocabulary.of(bench_flops.synthetic_encoding(config)))
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, x_t, t: nnx.merge(graphdef, params)(x_t, t))
    compiled = forward.lower(params, jnp.zeros((4, 64), int), jnp.zeros(4)).compile()
    counted = compiled.cost_analysis()["flops"]
    formula = 4 * 64 * bench_flops.forward_flops(config.model, outputs, keys=64)
    assert formula < counted < 1.05 * formula  # norms, softmax and the like come on top


def test_peaks_are_known_for_whole_devices_by_name_alone() -> None:
    assert bench_flops.peak_flops("NVIDIA H200", "bfloat16") == 989.4e12
    assert bench_flops.peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert bench_flops.peak_flops("NVIDIA L4", "bfloat16") == 121e12
    assert bench_flops.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert bench_flops.peak_flops("TPU v5", "bfloat16") == 459e12
    for unknown in ("cpu", "NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):
        assert bench_flops.peak_flops(unknown, "bfloat16") is None
    assert bench_flops.peak_flops("TPU v4", "float32") is None


def test_float32_is_what_jax_multiplies_by_default() -> None:
    assert bench_flops.precision(tiny()) == "float32"  # on a CPU
    assert bench_flops.precision(PRESETS["owt"]) == "bfloat16"


def test_a_report_divides_by_seconds_and_knows_no_mfu_on_a_cpu() -> None:
    numbers = speed.report(tiny(), tokens=100, flops=50.0, seconds=2.0, steps=4, compile_seconds=1.0)
    assert (numbers["tokens_per_second"], numbers["step_seconds"], numbers["flops_per_second"]) == (50, 0.5, 25)
    assert numbers["mfu"] is None
    assert numbers["peak_bytes"] > 1e6
    assert numbers["peak_bytes_of"] == "process"


def test_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_flops", lambda kind, dtype: 100.0)
    numbers = speed.report(tiny(), tokens=1, flops=120.0, seconds=2.0, steps=1, compile_seconds=0.0, devices=2)
    assert numbers["mfu"] == pytest.approx(60 / 200)


def test_the_synthetic_encoding_has_the_ids_of_the_real_one_and_reads_prompts() -> None:
    for tokenizer, entries in (("bytes", 257), ("gpt2", 50257), ("bpe", 4095)):
        encoding = bench_flops.synthetic_encoding(tiny(data={"tokenizer": tokenizer}))
        assert encoding.n_vocab == entries
        assert encoding.encode_ordinary("Hi") == [72, 105]


PROMPT = {"prompt": "abc"}


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param({"sample": PROMPT}, marks=pytest.mark.slow),
        {"sample": {**PROMPT, "guidance": 1.0}},
        pytest.param({"sample": {**PROMPT, "sampler": "first_hitting"}}, marks=pytest.mark.slow),
        {"objective": {"kind": "autoregressive"}, "sample": {"length": 10}},
        pytest.param(
            {"objective": {"kind": "block", "block_size": 2}, "sample": {**PROMPT, "length": 9}},
            marks=pytest.mark.slow,
        ),
        {"objective": {"kind": "block", "block_size": 4}, "sample": {**PROMPT, "sampler": "first_hitting"}},
    ],
    ids=["ancestral", "guided", "first-hitting", "autoregressive", "blocks", "first-hitting-blocks"],
)
def test_sampling_takes_the_counted_calls_of_the_network(
    monkeypatch: pytest.MonkeyPatch, groups: dict[str, Any]
) -> None:
    config = tiny(**groups)
    outputs, calls = bench_flops.vocab_size(config), []

    def logits(name: str, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(name))
        return jnp.zeros((*x.shape, outputs))

    monkeypatch.setattr(Transformer, "__call__", lambda self, x, t: logits("__call__", x))
    monkeypatch.setattr(Transformer, "extend", lambda self, cache, x: (logits("extend", x), cache))
    monkeypatch.setattr(Transformer, "denoise_block", lambda self, cache, x, t: logits("denoise_block", x))
    encoding = bench_flops.synthetic_encoding(config)
    graphdef, params = nnx.split(make_model(config, Vocabulary.of(encoding)))
    draw = generate.make_draw(config.sample, config, encoding, graphdef)
    jax.block_until_ready(draw(params, jax.random.key(0)))
    jax.effects_barrier()
    steps, flops = bench_flops._sampling_work(config, len(config.sample.prompt))
    assert steps is not None
    assert flops is not None
    kind = config.objective.kind
    denoising = calls.count({"autoregressive": "extend", "block": "denoise_block"}.get(kind, "__call__"))
    assert denoising == steps * (2 if config.sample.guidance else 1)
    size = {"autoregressive": 1, "block": config.objective.block_size}.get(kind, 8)
    # Between every call reading nothing and every call reading the whole row.
    head, rest = 2 * 16 * outputs, 2 * (4 * 16 * 16 + 2 * 16 * 32)
    least = 2 * size * (denoising * head + len(calls) * rest)
    assert least < flops <= least + 2 * size * len(calls) * 4 * 16 * 8


def test_the_sampler_bench_reports_every_field() -> None:
    numbers = speed.sample(tiny(), repeats=2)
    assert numbers["steps"] == 3
    assert numbers["sample_tokens"] == 16
    assert all(numbers[name] > 0 for name in ("tokens_per_second", "step_seconds", "flops_per_second"))
    assert numbers["compile_seconds"] > 0
    assert numbers["tokens_per_second"] * 3 * numbers["step_seconds"] == pytest.approx(16)


def test_steps_that_depend_on_the_text_are_unknown() -> None:
    for sampler in ("ancestral_skip", "confidence", "margin", "entropy"):
        assert bench_flops._sampling_work(tiny(sample={"sampler": sampler}), 0) == (None, None)


def test_the_loader_bench_reads_the_rows_of_an_update() -> None:
    numbers = speed.loader(tiny(), batches=3, rows=40, against=10.0)
    assert numbers["batch_tokens"] == 4 * 2 * 8
    assert numbers["batch_seconds"] * numbers["tokens_per_second"] == pytest.approx(64)
    assert numbers["multiple"] == pytest.approx(numbers["tokens_per_second"] / 10)
    assert speed.loader(tiny(), batches=1, rows=1)["multiple"] is None


def test_benches_refuse_what_measures_nothing() -> None:
    with pytest.raises(UsageError, match=r"raise --repeats"):
        speed.sample(tiny(), repeats=0)
    with pytest.raises(UsageError, match=r"raise --batches"):
        speed.loader(tiny(), batches=0)
    with pytest.raises(UsageError, match=r"above 0, not -1"):
        speed.loader(tiny(), against=-1.0)
    with pytest.raises(UsageError, match=r"shorten --sample\.prompt"):
        speed.sample(tiny(sample={"prompt": "x" * 8}))


HEAVY = ("array_record", "datasets", "fsspec", "grain", "prefect", "pyarrow")
FLAGS = """--data.tokenizer bytes --model.seq_len 8 --model.n_layers 1 --model.n_heads 2 --model.d_model 16
 --model.d_ff 32 --sample.num_steps 2 --sample.num_samples 2 --json""".split()


@pytest.mark.parametrize("which", ["train", pytest.param("sample", marks=pytest.mark.slow)])
def test_speed_is_measured_without_what_only_data_needs(which: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY}))\n"
        "from nanodlm.cli.main import main\n"
        f"main(['bench', {which!r}, 'demo', *{FLAGS}])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    fields = {"tokens_per_second", "step_seconds", "flops_per_second", "mfu", "peak_bytes", "compile_seconds"}
    assert fields <= set(numbers)
    assert np.isfinite(numbers["flops_per_second"])
