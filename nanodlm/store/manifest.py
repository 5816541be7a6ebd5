"""Records as JSON: canonical text, fingerprints, checksums, and what makes a manifest sound."""

import hashlib
import json
import re
import time
from typing import Any

import orjson

from nanodlm.errors import Damaged

Json = dict[str, Any]  # a record, such as that of a file: its `path`, `size` and `sha256`
Item = tuple[str, str]  # the stage and the fingerprint of an artifact
MANIFEST = "manifest.json"
FLOW_RUN = "NANODLM_FLOW_RUN"  # the variable in which an orchestrator names the run that artifacts are made for
SCHEMA = 1
RECORDS = "parts/"  # the folder, within that of an attempt, of the records of its finished parts
PACKAGES = ("nanodlm", "jax", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "tiktoken", "rustbpe")
NAME = re.compile(r"[0-9A-Za-z_-]+")  # of an attempt, a stage or a fingerprint in a manifest


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces; NaN and types that JSON lacks raise.

    >>> canonical_json({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_of(identity: Json) -> str:
    """Return the sha256, in hex, of the canonical JSON of everything that determines an artifact's bytes.

    >>> fingerprint_of({"stage": "shard"})[:8]
    'a8c0b4ff'
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def record_text(value: Any) -> bytes:
    """Return the JSON of a record as it lies in a store."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def sealed(value: Json) -> Json:
    """Return a record with a checksum over the rest of it, so that no altered byte of it goes unnoticed.

    >>> sealed({"a": 1})["checksum"][:8]
    '015abd7f'
    """
    rest = {k: v for k, v in value.items() if k != "checksum"}
    return {**rest, "checksum": hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()}


def is_sealed(value: Json) -> bool:
    """Say if a record's checksum is that of its content; earlier versions took it of a text with spaces."""
    rest = sealed(value)
    if value.get("checksum") == rest.pop("checksum"):
        return True
    return value.get("checksum") == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest_of(files: list[Json], volatile: list[str]) -> str:
    """Return the sha256 over path, size and sha256 of the files whose bytes the inputs determine."""
    stable = [file for file in files if not file["path"].startswith(tuple(volatile))]
    return fingerprint_of({file["path"]: [file["size"], file["sha256"]] for file in stable})


def safe(relative: str) -> str:
    """Return a manifest's path, and refuse one that would leave its artifact."""
    parts = relative.split("/")
    if relative[:1] == "/" or ".." in parts or relative.strip("./") == "" or set("\\\0") & set(relative):
        raise Damaged(f"a manifest names the path {relative!r}, which leaves its artifact: do not use this store")
    return relative


def problem_with(manifest: Any, stage: str, fingerprint: str) -> str:
    """Say what is wrong with a manifest in itself; an empty text when nothing is."""
    needed = {"schema", "digest", "files", "volatile", "attempt", "metrics", "inputs", "parameters"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        return "is not a manifest"
    if not is_sealed(manifest):
        return "has been altered: its checksum is not that of its content"
    try:
        if (manifest.get("stage"), manifest.get("fingerprint")) != (stage, fingerprint):
            return f"belongs to {manifest.get('stage')}/{manifest.get('fingerprint')}"
        "".join([*manifest["volatile"], *(file["path"] for file in manifest["files"])])  # all are texts
        adopted = [file["attempt"] for file in manifest["files"] if "attempt" in file]
        if not all(map(NAME.fullmatch, (manifest["attempt"], *adopted))):
            return "names an attempt that leaves its artifact"
        inputs = [name for pair in manifest["inputs"].items() for name in (pair[0], pair[1]["fingerprint"])]
        return "" if all(map(NAME.fullmatch, inputs)) else "names an input that leaves the store"
    except (TypeError, KeyError, AttributeError, ValueError):  # it was sealed by somebody else's program
        return "is not a manifest"


def utc_now() -> str:
    """Return the time as manifests give it, such as 2026-11-23T14:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
