"""The rooms that DESIGN.md draws, held by walking the imports."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nanodlm

ROOT = Path(nanodlm.__file__).parents[1]

# Each room, or file beside the rooms, and what it may import of the others; lowest first.
ROOMS = {
    "errors": set(),
    "diffusion": set(),
    "devices": {"errors"},
    "model": {"devices"},
    "config": {"errors", "diffusion"},
    "store": {"config", "errors"},
    "data": {"config", "errors", "store"},
    "provenance": {"store"},
    "precision": {"config", "errors", "model", "store"},
    "build": {"config", "data", "diffusion", "model", "precision"},
    "checkpoints": {"build", "config", "data", "devices", "errors", "model", "provenance", "store"},
    "evaluation": {
        "build", "checkpoints", "config", "data", "devices", "diffusion", "errors", "model", "store",
    },
    "training": {
        "build", "checkpoints", "config", "data", "devices", "diffusion", "errors", "evaluation", "model", "store",
    },
    "generation": {"build", "checkpoints", "config", "data", "diffusion", "errors", "evaluation", "model", "store"},
    "stages": {
        "checkpoints", "config", "data", "errors", "evaluation", "precision", "provenance", "store", "training",
    },
    "upkeep": {"checkpoints", "config", "data", "errors", "stages", "store"},
    "cluster": {"config", "errors", "stages", "store"},
    "bench": {
        "build", "checkpoints", "config", "data", "devices", "diffusion", "errors", "evaluation", "generation", "model",
        "stages", "store", "training",
    },
    "flows": {"cluster", "config", "errors", "evaluation", "precision", "stages", "store", "upkeep"},
    "cli": {
        "bench", "checkpoints", "cluster", "config", "data", "devices", "diffusion", "errors", "evaluation", "flows",
        "generation", "precision", "provenance", "stages", "store", "upkeep",
    },
    "__init__": {"checkpoints", "config", "diffusion", "stages"},
    "__main__": {"cli"},
}  # fmt: skip
LIGHT = ("cli.main", "cluster.follow", "config", "stages.run", "data.download", "data.split", "evaluation.report")
LIGHT += ("data.shard",)


def _modules() -> dict[str, Path]:
    """Every file of the source by its full name; a room's `__init__` has the room's."""
    files = [*(ROOT / "nanodlm").rglob("*.py"), *(ROOT / "nanodlm" / "flows").glob("*.py")]  # the latter is a link
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    """Full names of all modules, and of all names in them, that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _room(module: str) -> str:
    return module.partition(".")[2].split(".")[0] or "__init__"


def _needs(module: str) -> set[str]:
    """The project's modules that one imports; a package counts only where a name of its own is taken."""
    names = _imports(MODULES[module])
    found = {name for name in names if name in MODULES}
    inner = {name.rpartition(".")[0] for name in found}
    own = {name.rpartition(".")[0] for name in names if name not in MODULES}
    return found - (inner - own) - {module}


def _lines_of_code(path: Path) -> int:
    """Return how many lines of a file are neither empty, nor comments, nor docstrings."""
    text = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    said = [
        node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)
    ]
    lines = text.splitlines()
    for docstring in said:
        lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * ((docstring.end_lineno or 0) - docstring.lineno + 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_every_room_has_its_place() -> None:
    assert {_room(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_point_downward_only(room: str) -> None:
    for name in MODULES:
        if _room(name) == room:
            others = {_room(other) for other in _needs(name)} - {room, "__init__"}
            assert others <= ROOMS[room], name
    order = list(ROOMS)
    assert all(order.index(lower) < order.index(room) for lower in ROOMS[room])


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: _needs(name) - {"nanodlm"} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES) - 1  # raises CycleError


def test_the_science_knows_only_jax_and_itself() -> None:
    stdlib = {"collections", "dataclasses", "functools", "inspect", "math", "operator", "typing"}
    allowed = stdlib | {"jax", "jaxtyping", "nanodlm"}
    for name, path in MODULES.items():
        if _room(name) == "diffusion":
            assert {imported.split(".")[0] for imported in _imports(path)} <= allowed, name


def test_the_house_stays_small() -> None:
    lines = {name: path.read_text().count("\n") for name, path in MODULES.items()}
    science = sum(count for name, count in lines.items() if _room(name) in ("diffusion", "model"))
    tests = sum(path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py"))
    assert (sum(lines.values()) <= 17_745, science <= 2500, tests <= 21_620) == (True,) * 3
    assert {name for name, count in lines.items() if count > 300} <= {"nanodlm.config.settings"}
    nodes = [node for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text()))]
    lengths = [(node.end_lineno or 0) - node.lineno for node in nodes if isinstance(node, ast.FunctionDef)]
    assert sum(length > 60 for length in lengths) <= 4
    assert sum(_lines_of_code(path) for name, path in MODULES.items() if _room(name) in ("store", "upkeep")) <= 1500


def test_only_flows_import_prefect() -> None:
    for name, path in MODULES.items():
        roots = {imported.split(".")[0] for imported in _imports(path)}
        assert _room(name) == "flows" or "prefect" not in roots, name


def test_the_public_api_is_exactly_what_it_lists() -> None:
    samplers = {"sample", "sample_blocks", "sample_autoregressive", "Decoder"}
    assert {*nanodlm.__all__} == {"PRESETS", "Config", "make_schedule", "nelbo", "train", "load", *samplers}
    for name in nanodlm.__all__:
        assert getattr(nanodlm, name).__doc__ or name == "PRESETS"
    with pytest.raises(AttributeError):
        _ = nanodlm.nothing


def test_what_runs_beside_the_orchestrator_does_not_load_jax() -> None:
    modules = ", ".join(f"nanodlm.{name}" for name in LIGHT)
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "prefect", "pandas", "grain", "matplotlib", "jinja2"} & set(loaded)


def test_the_help_text_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom nanodlm.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "prefect", "pydantic", "tyro", "fsspec", "numpy"} & set(loaded)
