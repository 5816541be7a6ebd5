"""Plans for devices that do not exist: sizes as the sharding says, and one line on what cannot be."""

from pathlib import Path

import pytest

from nanodlm.bench import flops, memory
from nanodlm.config import PRESETS
from nanodlm.errors import UsageError
from tests.support.commands import nanodlm, result_of

TINY = PRESETS["demo"].replace(
    data={"tokenizer": "bytes"},
    model={"seq_len": 8, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 32},
    train={"batch_size": 16, "grad_acc_steps": 2, "optimizer": "adamw", "ema_decay": 0.9},
)


@pytest.mark.slow
def test_a_plan_says_that_each_device_holds_its_share_of_the_matrices_and_all_of_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(TINY.replace(train={"fsdp": 2, "tensor": 2}).model_dump_json())
    command = ["plan", str(file), "--devices", "8", "--json", "--store", str(tmp_path / "new")]
    planned = result_of(nanodlm(*command))["devices"]
    assert not (tmp_path / "new").exists()
    assert (planned["devices"], planned["mesh"]) == (8, {"data": 2, "fsdp": 2, "tensor": 2})
    matrices = 384 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 32)
    held = 4 * (matrices // 4 + planned["parameters"] - matrices)
    size = planned["bytes"]
    assert size["parameters"] == size["average"] == size["gradients"] == held
    assert 0 <= size["optimizer"] - 2 * held < 100  # and what it counts
    assert size["rows"] == 4 * 2 * 16 * 8 * 2 // 8
    assert size["temporaries"] > 0
    assert size["total"] == sum(size.values()) - size["gradients"] - size["total"]
    assert planned["tokens_per_update"] == 2 * 16 * 8
    assert planned["flops_per_update"] == flops.flops_per_update(TINY)
    text = memory.table(planned)
    assert text.startswith("8 devices: data 2 x fsdp 2 x tensor 2\n")
    assert all(words in text for words in (f"{planned['parameters']:,} parameters", "an indication"))


def test_sizes_that_devices_cannot_share_are_one_line_and_exit_code_2() -> None:
    done = nanodlm("plan", "--data.tokenizer", "bytes", "--devices", "6")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "nanodlm: a batch of 32 rows cannot be shared by 6 devices: use a multiple of 6, such as 36"
    ]
    with pytest.raises(UsageError, match="raise --devices"):
        memory.plan(TINY, 0)


@pytest.mark.slow
def test_1_3_billion_parameters_are_planned_for_64_devices() -> None:
    options = ["--devices", "64", "--train.fsdp", "8", "--train.tensor", "2", "--json"]
    planned = result_of(nanodlm("plan", "owt-1b", *options, JAX_DISABLE_MOST_OPTIMIZATIONS="0"))["devices"]
    assert 1.2e9 < planned["parameters"] < 1.45e9
    size = planned["bytes"]
    state = size["parameters"] + size["optimizer"] + size["average"]
    assert state * 16 == pytest.approx(4 * 4 * planned["parameters"], rel=0.01)
    assert size["total"] < 16 * 2**30
    assert planned["tokens_per_update"] == 2**20
    assert planned["flops_per_update"] == pytest.approx(6 * 2**20 * planned["parameters"], rel=0.1)
