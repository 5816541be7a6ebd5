"""Plans for devices that do not exist: sizes as the sharding says, and one line on what cannot be."""

import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nanodlm.bench import flops, memory
from nanodlm.cli import main
from nanodlm.config import PRESETS, Config
from nanodlm.errors import NanodlmError, UsageError
from tests.support.commands import nanodlm, result_of, started

SHAPE = {"seq_len": 8, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 32}
SLOW = partial(pytest.param, marks=pytest.mark.slow)
FLAGS = ["--data.tokenizer", "bytes", *(word for k, v in SHAPE.items() for word in (f"--model.{k}", str(v)))]


def tiny(**train: Any) -> Config:
    train = {"batch_size": 16, "grad_acc_steps": 2, "optimizer": "adamw", "ema_decay": 0.9, **train}
    return PRESETS["demo"].replace(data={"tokenizer": "bytes"}, model=SHAPE, train=train)


@pytest.mark.parametrize(("fsdp", "tensor"), [SLOW(1, 1), SLOW(8, 1), SLOW(2, 2)])
def test_each_device_holds_its_share_of_the_matrices_and_all_of_the_rest(fsdp: int, tensor: int) -> None:
    planned = memory.plan(tiny(fsdp=fsdp, tensor=tensor), 8)
    assert planned["mesh"] == {"data": 8 // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
    matrices = 384 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 32)
    held = 4 * (matrices // (fsdp * tensor) + planned["parameters"] - matrices)
    size = planned["bytes"]
    assert size["parameters"] == size["average"] == size["gradients"] == held
    assert 0 <= size["optimizer"] - 2 * held < 100  # and what it counts
    assert size["rows"] == 4 * 2 * 16 * 8 * tensor // 8
    assert size["temporaries"] > 0
    assert size["total"] == sum(size.values()) - size["gradients"] - size["total"]
    assert planned["tokens_per_update"] == 2 * 16 * 8
    assert planned["flops_per_update"] == flops.flops_per_update(tiny())
    assert planned["collectives"]["all-reduce"] > 0
    assert (planned["collectives"]["all-gather"] > 1) == (fsdp > 1)


@pytest.mark.slow
def test_the_command_prints_a_table_or_one_object_and_builds_nothing(tmp_path: Path) -> None:
    args = [
        "plan",
        *FLAGS,
        "--train.optimizer",
        "adamw",
        "--devices",
        "4",
        "--train.fsdp",
        "2",
        "--store",
        str(tmp_path / "new"),
    ]
    planned = result_of(nanodlm(*args, "--json"))["devices"]
    assert (planned["devices"], planned["mesh"]) == (4, {"data": 2, "fsdp": 2, "tensor": 1})
    assert {"parameters", "flops_per_update", "compile_seconds"} <= set(planned)
    assert not (tmp_path / "new").exists()
    said = memory.table(planned)
    assert "4 devices: data 2 x fsdp 2 x tensor 1" in said
    for words in (f"{planned['parameters']:,} parameters", "an indication", "all-gather", "total"):
        assert words in said


def test_sizes_that_devices_cannot_share_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["plan", *FLAGS, "--devices", "6"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "nanodlm: a batch of 8 rows cannot be shared by 6 devices: use a multiple of 6, such as 12"
    ]
    with pytest.raises(UsageError, match="raise --devices"):
        memory.plan(tiny(), 0)


@pytest.mark.slow
def test_matrices_that_devices_cannot_cut_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--train\.fsdp 16 cannot cut evenly"):
        memory.plan(tiny().replace(model={"d_model": 24}, train={"fsdp": 16}), 16)


def test_a_plan_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT_SECONDS", 0.1)
    with pytest.raises(NanodlmError, match="plan for fewer"):
        memory.plan(tiny(), 2)


def test_compiling_ends_when_the_command_is_killed() -> None:
    with started("plan", "owt-1b", "--devices", "2") as command:
        children: list[str] = []
        for _ in range(200):
            listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(command.pid)], capture_output=True, text=True)
            children = listed.stdout.split()
            if children:
                break
            time.sleep(0.1)
        assert children
        command.send_signal(signal.SIGKILL)
        for _ in range(100):  # compiling takes longer
            if not Path(f"/proc/{children[0]}").exists():
                return
            time.sleep(0.1)
    pytest.fail("the child outlived its parent")


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (8, 2)])
def test_1_3_billion_parameters_are_planned_for_64_devices(fsdp: int, tensor: int) -> None:
    flags = ["--devices", "64", "--train.fsdp", str(fsdp), "--train.tensor", str(tensor), "--json"]
    planned = result_of(nanodlm("plan", "owt-1b", *flags, JAX_DISABLE_MOST_OPTIMIZATIONS="0"))["devices"]
    assert 1.2e9 < planned["parameters"] < 1.45e9
    size = planned["bytes"]
    state = size["parameters"] + size["optimizer"] + size["average"]
    assert state * fsdp * tensor == pytest.approx(4 * 4 * planned["parameters"], rel=0.01)
    assert size["total"] < 16 * 2**30
    assert planned["tokens_per_update"] == 2**20
    assert planned["flops_per_update"] == pytest.approx(6 * 2**20 * planned["parameters"], rel=0.1)
