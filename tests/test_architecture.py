"""The layers that DESIGN.md draws, held by walking the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nanodlm

ROOT = Path(nanodlm.__file__).parents[1]

# Each module and the package's modules it may import, lowest first.
LAYERS = {
    "errors": set(),
    "schedules": set(),
    "diffusion": {"schedules"},
    "losses": {"diffusion", "schedules"},
    "samplers": {"diffusion", "losses", "schedules"},
    "config": {"errors"},
    "storage": {"config", "errors"},
    "cache": {"errors", "storage"},
    "store": {"cache", "config", "errors", "storage"},
    "tokenizer": {"errors"},
    "sharding": {"errors"},
    "model": {"sharding"},
    "plain": {"diffusion", "model"},
    "shards": {"errors"},
    "loader": {"shards"},
    "metrics": {"config", "errors"},
    "optimizer": {"config"},
    "corpus": {"config", "errors", "store"},
    "checkpoint": {"config", "errors", "losses", "model", "schedules", "sharding", "store", "tokenizer"},
    "scoring": {"losses", "model", "sharding"},
    "preparation": {"config", "corpus", "errors", "shards", "store", "tokenizer"},
    "update": {"checkpoint", "config", "errors", "losses", "model", "optimizer", "sharding"},
    "training": {
        "cache", "checkpoint", "config", "errors", "loader", "metrics", "scoring", "sharding", "shards", "store",
        "tokenizer", "update",
    },
    "evaluation": {
        "checkpoint", "config", "errors", "losses", "metrics", "model", "scoring", "sharding", "shards", "store",
        "tokenizer",
    },
    "generation": {"checkpoint", "config", "errors", "losses", "model", "samplers", "store", "tokenizer"},
    "report": {"config", "store"},
    "stages": {"cache", "config", "corpus", "errors", "store"},
    "fanout": {"config", "corpus", "preparation", "shards", "stages", "store"},
    "upkeep": {"config", "corpus", "errors", "stages", "storage", "store"},
    "costs": {"cache", "errors", "store"},
    "bench": {
        "checkpoint", "config", "errors", "generation", "loader", "plain", "sharding", "shards", "tokenizer", "update",
    },
    "experiments": {
        "checkpoint", "config", "errors", "evaluation", "losses", "model", "optimizer", "plain", "schedules", "shards",
        "stages", "store", "tokenizer", "update",
    },
    "launch": {"config", "errors"},
    "cluster": {"config", "errors", "launch", "stages", "storage", "store"},
    "planning": {"bench", "config", "errors", "launch", "sharding", "update"},
    "console": {"store"},
    "cli": {
        "bench", "cache", "cluster", "config", "console", "corpus", "costs", "errors", "experiments", "launch",
        "metrics", "planning", "stages", "store", "tokenizer", "upkeep",
    },
    "__init__": {"checkpoint", "config", "losses", "samplers", "schedules", "stages"},
    "__main__": {"cli"},
}  # fmt: skip
PURE = ("schedules", "diffusion", "losses", "samplers")


def _imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _own(path: Path) -> set[str]:
    modules = {p.stem for p in (ROOT / "nanodlm").glob("*.py")}
    return {n.split(".")[1] for n in _imports(path) if n.startswith("nanodlm.")} & modules


def test_every_module_has_its_place() -> None:
    assert {p.stem for p in (ROOT / "nanodlm").glob("*.py")} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_imports_point_downward_only(name: str) -> None:
    assert _own(ROOT / "nanodlm" / f"{name}.py") <= LAYERS[name]
    order = list(LAYERS)
    assert all(order.index(lower) < order.index(name) for lower in LAYERS[name])


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_only_jax_and_each_other(name: str) -> None:
    allowed = {"jax", "jaxtyping", "collections", "dataclasses", "functools", "math", "typing", "nanodlm"}
    assert {n.split(".")[0] for n in _imports(ROOT / "nanodlm" / f"{name}.py")} <= allowed


def test_only_flows_import_prefect_and_only_the_command_line_imports_flows() -> None:
    for path in (ROOT / "nanodlm").glob("*.py"):
        roots = {n.split(".")[0] for n in _imports(path)}
        assert "prefect" not in roots, path
        assert path.stem == "cli" or "flows" not in roots, path


def test_the_public_api_is_exactly_what_it_lists() -> None:
    assert set(nanodlm.__all__) == set(nanodlm._HOME)
    for name in nanodlm.__all__:
        assert getattr(nanodlm, name).__doc__ or name == "PRESETS"
    with pytest.raises(AttributeError):
        _ = nanodlm.nothing


def test_what_runs_beside_the_orchestrator_does_not_load_jax() -> None:
    modules = ", ".join(
        f"nanodlm.{m}" for m in ("cli", "cluster", "config", "stages", "corpus", "preparation", "report", "planning")
    )
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "prefect", "datasets", "grain"} & set(loaded)


def test_the_help_text_loads_nothing_heavy() -> None:
    code = "import sys, nanodlm.cli\ntry: nanodlm.cli.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "prefect", "pydantic", "tyro", "fsspec", "numpy"} & set(loaded)
