"""The command that checks whether this machine can do the job."""

import sys
from importlib import import_module as load
from importlib.metadata import version

from nanodlm.cli.arguments import Output
from nanodlm.cli.store import OpenStore
from nanodlm.config import DataConfig, explain
from nanodlm.errors import NanodlmError
from nanodlm.store import Store

PACKAGES = ("jax", "flax", "orbax-checkpoint", "grain", "prefect")


def doctor(*, store: OpenStore, out: Output) -> None:
    """Check this machine: packages, devices, store, corpus, encodings."""
    rows = []
    for name, check in (
        ("python", lambda: sys.version.split()[0]),
        ("packages", lambda: ", ".join(f"{name} {version(name)}" for name in PACKAGES)),
        ("devices", lambda: ", ".join(f"{d.platform} {d.device_kind}" for d in load("jax").devices())),
        ("store", lambda: _writable(store)),
        ("corpus", lambda: f"{len(load('nanodlm.data.sources').source_files(DataConfig()))} built-in documents"),
        ("gpt2", lambda: f"{load('nanodlm.data.tokenizer').gpt2().n_vocab:,} entries"),
    ):
        try:
            ok, text = True, check()
        except Exception as error:
            ok, text = False, explain(error)[:200] or type(error).__name__
        rows.append({"name": name, "ok": ok, "text": text})
        out.text(f"{'ok' if ok else 'FAILED':<7} {name:<10} {text}")
    failed = [row["name"] for row in rows if not row["ok"]]
    out.json(checks=rows, ok=not failed)
    if failed:
        raise NanodlmError(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}")


def _writable(store: Store) -> str:
    store.now()  # which writes a file
    store.require_create_only()
    return f"{store.uri()} can be written" + ("" if store.is_local else ", and creates a file only once")
