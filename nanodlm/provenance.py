"""Which source files a result was made by, and which of them have changed since."""

import ast
import subprocess
from functools import cache
from pathlib import Path

import nanodlm
from nanodlm.store import Artifact, Json, fingerprint_of
from nanodlm.store.disk import sha256_of

PACKAGE = Path(nanodlm.__file__).parent
# Settings and inputs are compared by value, and where artifacts lie decides no byte of them.
LEFT_OUT = ("config", "errors", "provenance", "stages", "store")


@cache
def sources(module: str) -> dict[str, str]:
    """Return the start of the sha256 of each file, by path, that a module is or imports, and so on, but `LEFT_OUT`."""
    files, waiting = set(), [_path(module)]
    while waiting:
        file = waiting.pop()
        ours = file.is_relative_to(PACKAGE) and file.exists()  # it may have been removed since
        if ours and file not in files and file.relative_to(PACKAGE).parts[0].removesuffix(".py") not in LEFT_OUT:
            files.add(file)
            waiting += _imports(file)
    return {file.relative_to(PACKAGE).as_posix(): sha256_of(file)[:16] for file in sorted(files)}


def _path(module: str) -> Path:
    return PACKAGE.parent / (module.replace(".", "/") + ".py")


@cache
def _imports(file: Path) -> list[Path]:
    try:
        froms = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    except SyntaxError:  # somebody is in the middle of an edit
        return []
    names = {name for node in froms for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))}
    return [_path(name) for name in names if name and name.startswith("nanodlm.") and _path(name).exists()]


def code_record(module: str) -> Json:
    """Return what a manifest says of the code: its `digest`, its `module` and `files`, and git's `commit` of it."""
    files = sources(module)
    return {"digest": fingerprint_of(files), **_commit(), "module": module, "files": files}


@cache
def _commit() -> Json:
    """Return the `commit` of this clone and whether it was `modified` since; nothing where git tells nothing."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PACKAGE), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # it may lie in an environment within another clone
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {}


def changed_since(artifact: Artifact) -> list[str]:
    """Return the files that made an artifact and have changed since: none where its manifest does not name them."""
    code: Json | None = artifact.manifest.get("code")
    if code is None:
        return []
    then, now = code["files"], sources(code["module"])
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def remark(changed: list[str]) -> str:
    """Return a remark on changed files, empty without any.

    >>> remark(["model/layers.py", "model/views.py", "training/step.py"])
    'made before model/layers.py and 2 more changed'
    """
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"made before {changed[0]}{more} changed" if changed else ""
