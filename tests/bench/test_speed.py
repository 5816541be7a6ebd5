"""The benches of speed: their formulae, their fields, what they import. Speed itself is never asserted."""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nanodlm.bench import flops as bench_flops
from nanodlm.bench import speed
from nanodlm.build import make_model
from nanodlm.cli.main import main
from nanodlm.config import PRESETS, Config
from nanodlm.data.vocabulary import Vocabulary
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
    skipped = 6 * 768 * 50304 * (1 - half)
    assert bench_flops.flops_per_token(config, 50304, output_share=half) == pytest.approx(whole - skipped)
    causal = config.replace(objective={"kind": "autoregressive"})
    assert bench_flops.flops_per_token(causal, 50304) == pytest.approx(whole - attention * (1 - half))
    # A block network also reads the clean row, but for what its last layer makes of it.
    d, d_ff, length, size = 16, 32, 8, 2
    config = tiny(model={"n_layers": 3}, objective={"kind": "block", "block_size": size})
    layer = 6 * (4 * d * d + 2 * d * d_ff)
    attention = 12 * d * (length + size) / 2  # of its own block and those before
    by_hand = 5 * (layer + attention) + 6 * 2 * d * d + 6 * d * 384  # keys and values of the last layer, logits
    assert bench_flops.flops_per_token(config, 384) == pytest.approx(by_hand)


def test_peaks_are_known_for_whole_devices_by_name_alone() -> None:
    known = {"NVIDIA H200": 989.4e12, "NVIDIA L4": 121e12, "TPU v5 lite": 197e12, "TPU v5": 459e12}
    unknown = dict.fromkeys(("cpu", "NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"))
    for kind, peak in {**known, **unknown}.items():
        assert bench_flops.peak_flops(kind, "bfloat16") == peak
    assert bench_flops.peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert bench_flops.peak_flops("TPU v4", "float32") is None


def test_a_report_divides_by_seconds_and_knows_the_precision() -> None:
    numbers = speed.report(tiny(), tokens=100, seconds=2.0)
    assert (numbers["tokens_per_second"], numbers["precision"], numbers["peak_bytes_of"]) == (50, "float32", "process")
    assert numbers["peak_bytes"] > 1e6
    assert speed.report(PRESETS["owt"], tokens=1, seconds=1.0)["precision"] == "bfloat16"


def test_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_flops", lambda kind, dtype: 100.0)
    numbers = speed.train(tiny(), steps=1)
    assert numbers["flops_per_second"] == pytest.approx(bench_flops.flops_per_update(tiny()) / numbers["step_seconds"])
    assert numbers["mfu"] == pytest.approx(numbers["flops_per_second"] / (100 * numbers["devices"]))


def test_the_loader_bench_reads_the_rows_of_an_update() -> None:
    numbers = speed.loader(tiny(), batches=3)
    assert numbers["batch_tokens"] == 4 * 2 * 8
    assert numbers["batch_seconds"] * numbers["tokens_per_second"] == pytest.approx(64)


@pytest.mark.parametrize("words", ["train --steps 0", "sample --repeats 0", "loader --batches 0"])
def test_benches_refuse_what_measures_nothing(capsys: pytest.CaptureFixture[str], words: str) -> None:
    command, flag, value = words.split()
    with pytest.raises(SystemExit, match="2"):
        main(["bench", command, flag, value])
    assert f"{flag} must be above 0, not {value}" in capsys.readouterr().err


HEAVY = ("array_record", "datasets", "fsspec", "grain", "prefect", "pyarrow")
FLAGS = """--data.tokenizer bytes --model.seq_len 8 --model.n_layers 1 --model.n_heads 2 --model.d_model 16
 --model.d_ff 32 --sample.num_steps 2 --sample.num_samples 2 --json""".split()


@pytest.mark.parametrize(
    "which", [("train", "--steps", "1"), pytest.param(("sample",), marks=pytest.mark.slow)], ids=str
)
def test_speed_is_measured_without_what_only_data_needs(which: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY}))\n"
        "from nanodlm.cli.main import main\n"
        f"main(['bench', *{which}, *{FLAGS}])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    seconds = {"train": "step_seconds", "sample": "draw_seconds"}[which[0]]
    fields = ["tokens_per_second", seconds, "peak_bytes", "compile_seconds"]
    assert all(numbers[field] > 0 for field in fields)
    if which[0] == "train":
        assert (numbers["mfu"], numbers["flops_per_second"] > 0) == (None, True)
    else:
        assert numbers["tokens_per_second"] * numbers["draw_seconds"] == pytest.approx(numbers["sample_tokens"]) == 16


def test_forward_flops_are_those_that_xla_counts() -> None:
    config = tiny(model={"d_model": 128, "n_heads": 4, "d_ff": 512, "seq_len": 64, "conv_width": 0})
    vocabulary = Vocabulary.of(bench_flops.synthetic_encoding(config))
    graphdef, params = nnx.split(make_model(config, vocabulary))
    forward = jax.jit(lambda params, x_t, t: nnx.merge(graphdef, params)(x_t, t))
    counted = forward.lower(params, jnp.zeros((4, 64), int), jnp.zeros(4)).compile().cost_analysis()["flops"]
    formula = 4 * 64 * bench_flops.flops_per_token(config, vocabulary.padded_size) / 3  # a third of a training's
    assert formula < counted < 1.05 * formula  # norms, softmax and the like come on top
