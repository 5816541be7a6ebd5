"""Commands that look at a store, and look after it; `doctor` looks at this machine as well."""

import json
import sys
import time
from importlib import import_module as load
from importlib.metadata import version
from typing import Annotated

from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.cli.arguments import Output
from nanodlm.config import DataConfig, explain, parse_address
from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.provenance import changed_since, remark
from nanodlm.stages.progress import summary
from nanodlm.stages.run import default_store
from nanodlm.store import Artifact, Store
from nanodlm.upkeep import ages
from nanodlm.upkeep.collect import collect, remove
from nanodlm.upkeep.copy import copy as copy_artifacts
from nanodlm.upkeep.verify import chain, check, in_order

_default = arg(metavar="URL", help_behavior_hint="(default: $NANODLM_STORE, else data/store)")
Url = Annotated[str, Doc("Where artifacts lie: a folder or an fsspec URL."), _default]


def _open_store(store: Url = "") -> Store:
    return Store(store or default_store())


OpenStore = Annotated[Store, arg(name="", constructor=_open_store)]
Uri = Annotated[str, Doc("An artifact, as `nanodlm ls` prints it.")]
From = Annotated[str, Doc("A store, or one artifact, as `nanodlm ls` prints it.")]
To = Annotated[str, Doc("The store to copy to.")]
Chain = Annotated[str, Doc("Artifact to check, with all it was made from; by default the whole store.")]
Deep = Annotated[bool, Doc("Read every file and compare its sha256, not only its size.")]
Repair = Annotated[bool, Doc("Build again what is bad, keeping the parts that are good.")]
Recursive = Annotated[bool, Doc("Remove all that was made from it as well.")]
DryRun = Annotated[bool, Doc("Only say what would be removed.")]
PACKAGES = ("jax", "flax", "orbax-checkpoint", "grain", "prefect")  # whose versions `doctor` says


def ls(*, store: OpenStore, out: Output) -> None:
    """List the artifacts of a store: age, size, address, what each was made from."""
    rows = []
    for artifact in in_order(dict(store.artifacts(store))).values():
        if isinstance(artifact, Damaged):
            print(f"nanodlm: {artifact}", file=sys.stderr)
        if not isinstance(artifact, Artifact):  # it was removed just now
            continue
        size, age = _size(artifact), time.time() - ages.made_at(artifact)
        inputs = {name: made["fingerprint"] for name, made in artifact.manifest["inputs"].items()}
        name = (artifact.manifest.get("config") or {}).get("exp", {}).get("run_name", "")
        row = {"stage": artifact.stage, "uri": artifact.uri, "bytes": size, "created": artifact.manifest["created"]}
        row |= {"name": name, "val_bits_per_byte": artifact.metrics.get("val_bits_per_byte")}
        rows.append({**row, "age_seconds": round(age), "inputs": inputs})
        said = "  ".join(filter(None, [name, summary(artifact)]))
        out.prose(said, f"{artifact.name:<22} {_ago(artifact):>4} {ages.size(size):>10}  ")
        if changed := changed_since(artifact):
            out.prose(remark(changed), f"{'':<23}")
        if inputs:
            out.prose(" ".join(f"{name}/{made[:12]}" for name, made in inputs.items()), f"{'':<23}from ")
    total = ages.size(sum(row["bytes"] for row in rows))
    out.text(f"{_count(rows)}, {total}, in {store.uri()}" if rows else f"no artifacts in {store.uri()}")
    out.json(artifacts=rows)


def show(uri: Uri, /, *, store: OpenStore, out: Output) -> None:
    """Show where an artifact came from, its settings, metrics, packages and files."""
    artifact = _store_of(uri, store).open(uri)
    m = artifact.manifest
    code = m.get("code") or {}
    made = {"when": f"{m['created']}, {_ago(artifact)} ago", "seconds": m["seconds"], "digest": m["digest"]}
    made |= {"commit": code.get("commit"), "and changes": code.get("modified"), "flow run": m.get("flow_run")}
    groups = {"made": made, "inputs": {name: from_["digest"] for name, from_ in m["inputs"].items()}}
    out.text(artifact.uri, f"{ages.size(_size(artifact))} in {_count(m['files'], 'file')}", "", "lineage")
    for item, found in list(chain(artifact.store, (artifact.stage, artifact.fingerprint)).items())[:-1]:
        there = "  (damaged)" if isinstance(found, Damaged) else "" if found else "  (not there any more)"
        out.text(f"  {item[0]:<12} {artifact.store.uri(*item)}{there}")
    for title, values in {**groups, **{name: m[name] for name in ("parameters", "metrics", "packages")}}.items():
        out.text("", title)
        for key, value in values.items():
            out.text(f"  {key:<28} {value if isinstance(value, str) else json.dumps(value)}")
    out.text("", f"files in {artifact.folder}")
    for file in m["files"]:
        out.text(f"  {file['size']:>12,}  {file['sha256'][:12]}  {file['path']}")
    out.json(uri=artifact.uri, **m)


def verify(uri: Chain = "", /, *, store: OpenStore, deep: Deep = False, repair: Repair = False, out: Output) -> None:
    """Check artifacts against their manifests, and repair them when asked to."""
    store = _store_of(uri, store) if uri else store
    targets = chain(store, *([store.locate(uri)] if uri else store))
    rows = []
    with out.showing("verify") as emit:
        for found in check(store, targets, deep=deep, repair=repair, emit=emit):
            row = {"problems": found.problems, "repaired": found.repaired, "strays": found.strays}
            rows.append({"uri": store.uri(found.stage, found.fingerprint), **row})
            status = "REPAIRED" if found.repaired else "DAMAGED" if found.problems else "ok"
            name = f"{found.stage}/{found.fingerprint[:12]}"
            strays = (f"{path} is nobody's file, which harms nothing" for path in found.strays)
            out.text(f"{status:<8} {name}", *(f"{'':<8} {line}" for line in (*found.problems, *strays)))
    bad, repaired = sum(bool(row["problems"]) for row in rows), sum(row["repaired"] for row in rows)
    out.json(artifacts=rows, damaged=bad, repaired=repaired)
    if bad > repaired:
        advice = "what could not be repaired says why" if repair else "add --repair to build again what is bad"
        raise NanodlmError(f"{bad - repaired} of {len(rows)} artifacts are damaged: {advice}")
    mended = f", {repaired} repaired" if repaired else ""
    good = f"{_count(rows)}{mended}: every file has its {'sha256' if deep else 'size'}"
    out.text(good if rows else f"no artifacts in {store.uri()}")


def gc(
    *,
    store: OpenStore,
    dry_run: DryRun = False,
    keep_last: Annotated[int | None, Doc("Newest results to keep, with all they were made from; else all.")] = None,
    older_than: Annotated[str | None, Doc("Give up results older than this, such as 30d."), arg(metavar="AGE")] = None,
    grace: Annotated[str, Doc("Leave alone what changed this lately."), arg(metavar="AGE")] = "1h",
    out: Output,
) -> None:
    """Remove abandoned attempts and uploads, and old results when asked to."""
    older, recent = None if older_than is None else ages.seconds(older_than), ages.seconds(grace)
    removed = []
    for row in collect(store, keep_last=keep_last, older_than=older, grace=recent, dry_run=dry_run):
        removed.append(row)
        size = "" if row["kind"] == "upload" else ages.size(row["bytes"])  # S3 does not say what it holds
        out.text(f"{'would remove' if dry_run else 'removed'} {size:>10}  {row['kind']:<8} {row['uri']}")
    if not removed:
        out.text("nothing to remove")
    elif any(row["kind"] == "artifact" for row in removed):
        out.text(f"the files of artifacts go with the first collection after {grace}; until then a run may adopt them")
    out.json(removed=removed, dry_run=dry_run)


def rm(uri: Uri, /, *, store: OpenStore, recursive: Recursive = False, dry_run: DryRun = False, out: Output) -> None:
    """Remove an artifact at once, or what a build of it has left."""
    store = _store_of(uri, store)
    rows, address = [], parse_address(uri)
    if address.checkpoint is not None or "/attempts/" in uri:
        raise UsageError(f"{uri} names a part of an artifact: name the artifact, which is removed as a whole")
    item = address.stage, address.fingerprint
    if not (address.stage and store.files(store.path(*item))):  # it may be without a manifest, removed in part
        item = store.locate(uri)
    for row in remove(store, item, recursive, dry_run):
        rows.append(row)
        out.text(f"{'would remove' if dry_run else 'removed'} {ages.size(row['bytes']):>10}  {row['uri']}")
    out.json(removed=rows, dry_run=dry_run)


def copy(src: From, dst: To, /, *, store: OpenStore, out: Output) -> None:
    """Copy an artifact with all it was made from, or a whole store, to another store."""
    source = Store(src)
    targets = in_order(dict(source.artifacts(source)))
    if not targets:
        source = _store_of(src, store)
        targets = chain(source, source.locate(src))
    rows, sent = [], 0
    with out.showing("copy") as emit:
        for artifact, copied in copy_artifacts(source, Store(dst), targets, emit):
            rows.append({"uri": artifact.uri, "copied": copied})
            sent += _size(artifact) if copied else 0
            out.text(f"{'copied' if copied else 'there':<8} {artifact.name}")
    out.text(f"{_count(rows)} there; {ages.size(sent)} copied, each file compared with its sha256")
    if not all(row["copied"] for row in rows):
        out.text("what was there before was compared by size: `nanodlm verify --deep` reads it")
    out.json(artifacts=rows)


def doctor(*, store: OpenStore, out: Output) -> None:
    """Check this machine: packages, devices, store, corpus, encodings."""
    rows = []
    for name, look in (
        ("python", lambda: sys.version.split()[0]),
        ("packages", lambda: ", ".join(f"{name} {version(name)}" for name in PACKAGES)),
        (
            "devices",
            lambda: ", ".join(f"{d.platform} {d.device_kind}".removeprefix("cpu ") for d in load("jax").devices()),
        ),
        ("store", lambda: _writable(store)),
        ("corpus", lambda: f"{len(load('nanodlm.data.sources').source_files(DataConfig()))} built-in documents"),
        ("gpt2", lambda: f"{load('nanodlm.data.tokenizer').gpt2().n_vocab:,} entries"),
    ):
        try:
            ok, text = True, look()
        except Exception as error:
            ok, text = False, explain(error)[:200] or type(error).__name__
        rows.append({"name": name, "ok": ok, "text": text})
        out.text(f"{'ok' if ok else 'FAILED':<7} {name:<10} {text}")
    failed = [row["name"] for row in rows if not row["ok"]]
    out.json(checks=rows, ok=not failed)
    if failed:
        raise NanodlmError(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}")


def _writable(store: Store) -> str:
    store.now()  # which writes a file, and tries to write it again
    return f"{store.uri()} can be written" + ("" if store.is_local else ", and creates a file only once")


def _store_of(uri: str, store: Store) -> Store:
    """Return the store of the artifact at a URI, which may name another than the given one."""
    address = parse_address(uri).store
    return Store(address) if address else store


def _size(artifact: Artifact) -> int:
    return sum(file["size"] for file in artifact.manifest["files"])


def _count(things: list, noun: str = "artifact") -> str:
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"


def _ago(artifact: Artifact) -> str:
    seconds = time.time() - ages.made_at(artifact)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"
