"""What sets runs apart: settings, data, code, and bounds with the significance of their difference."""

import math
from itertools import product
from typing import Any

import numpy as np
import yaml
from scipy.special import stdtr

from nanodlm.config import differences
from nanodlm.config.differences import flat
from nanodlm.evaluation import figures
from nanodlm.evaluation.artifacts import logs_of, texts_of
from nanodlm.evaluation.page import render
from nanodlm.evaluation.uncertainty import count_documents, ratio_stderr
from nanodlm.store import Artifact


def made_from(train: Artifact) -> dict[str, list[Artifact]]:
    """Return a training and its evaluations and samples, as far as there are any, by stage; the newest come last."""
    found = [one for _, one in train.store.artifacts(item for item in train.store if item[0] in ("evaluate", "sample"))]
    mine = [one for one in found if isinstance(one, Artifact) and ("train", train.fingerprint) in one.inputs]
    mine = [one for one in mine if one.stage == "sample" or "sets" in one.metrics]  # earlier versions kept no rows
    mine.sort(key=lambda one: one.manifest["created"])
    of_stage = {stage: [one for one in mine if one.stage == stage] for stage in ("evaluate", "sample")}
    return {"train": [train], **of_stage}


def compare(first: dict[str, list[Artifact]], second: dict[str, list[Artifact]]) -> dict[str, Any]:
    """Return how the second of two runs differs from the first; see `made_from`.

    Of several evaluations the newest two of equal settings are compared, for only then are rows the same.
    `not_compared` says why there are no bounds.
    """
    trained = first["train"][0].manifest, second["train"][0].manifest
    settings = differences(*({k: v for k, v in m["config"].items() if k != "exp"} for m in trained))
    data = [name for name in trained[0]["inputs"] if len({m["inputs"][name]["digest"] for m in trained}) > 1]
    files = [(m.get("code") or {}).get("files", {}) for m in trained]
    code = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    found: dict[str, Any] = {"settings": settings, "data": data, "code": code, "bounds": [], "not_compared": ""}
    pairs = list(product(first["evaluate"], second["evaluate"]))
    equal = [(one, other) for one, other in pairs if one.manifest["parameters"] == other.manifest["parameters"]]
    layouts = {m["config"]["data"].get("rows", "stream") for m in trained}
    if len(layouts) > 1:  # one of them is told how long each text is
        found["not_compared"] = f"rows are {' and '.join(sorted(layouts))}: bounds of other questions"
    elif not pairs:
        lacking = " and ".join(run["train"][0].name for run in (first, second) if not run["evaluate"])
        found["not_compared"] = f"there is no whole evaluation of {lacking}: `nanodlm evaluate` makes it"
    elif pair := (equal or pairs)[-1:]:
        tables = [np.load(one.file("rows.npy"), allow_pickle=False) for one in pair[0]]
        sets = [["held out", *(m["file"] for m in one.metrics["sets"])] for one in pair[0]]
        for name in filter(sets[1].__contains__, sets[0]):
            rows = [t[t["set"] == of.index(name)] for t, of in zip(tables, sets, strict=True)]
            found["bounds"] += [{"set": name, **bounds(*rows)}] if min(map(len, rows)) > 1 else []
    both = first["sample"] and second["sample"]
    found["samples"] = [texts_of(run["sample"][-1])[0] for run in (first, second)] if both else []
    return found


def bounds(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Return the bounds of two tables of rows in bits per byte, how they differ, and the p-value of no difference.

    Rows that are the same text are compared in pairs, so that what makes a text hard to both counts as no difference
    between them; others, as of two tokenizers, as samples of their own. By Student's t, for other documents.
    """
    tables = first, second
    bits = [float(rows["nats"].sum() / rows["bytes"].sum()) / math.log(2) for rows in tables]
    documents = [np.stack([rows["first"], rows["last"]], axis=1) for rows in tables]
    counts = [count_documents(of) for of in documents]
    shared = [of if count > 1 else None for of, count in zip(documents, counts, strict=True)]
    names = [name for name in first.dtype.names or () if name not in ("nats", "set")]
    paired = len(first) == len(second) and all((first[name] == second[name]).all() for name in names)
    if paired:
        error = ratio_stderr(second["nats"] - first["nats"], first["bytes"], shared[0])
    else:
        error = math.hypot(*(ratio_stderr(t["nats"], t["bytes"], of) for t, of in zip(tables, shared, strict=True)))
    n = min(min(len(rows), count) if count > 1 else len(rows) for rows, count in zip(tables, counts, strict=True))
    error /= math.log(2)
    change = bits[1] - bits[0]
    p = 2 * float(stdtr(n - 1, -abs(change) / error)) if error else float(change == 0)
    return {"bits_per_byte": bits, "difference": change, "difference_stderr": error, "p": p, "paired": paired}


def page(runs: list[dict[str, list[Artifact]]], found: list[dict[str, Any]]) -> str:
    """Return a comparison of runs as one HTML file: what `compare` found of the first with each other, and pictures."""
    trained = [run["train"][0] for run in runs]
    called = [train.manifest["config"]["exp"]["run_name"] or train.name for train in trained]
    names = [n if called.count(n) == 1 else f"{n} ({t.name})" for n, t in zip(called, trained, strict=True)]
    logs = {name: logs_of(train) for name, train in zip(names, trained, strict=True)}
    timed = all(of and of[-1].get("seconds") for of in logs.values())
    settings = [flat(train.manifest["config"]) for train in trained]
    differ = sorted({name for of in found for name in of["settings"]})
    written = [texts_of(run["sample"][-1]) if run["sample"] else [] for run in runs]
    return render(
        "compare.html",
        names=names,
        date=max(train.manifest["created"] for train in trained)[:10],
        runs=list(zip(names, runs, written, strict=True)),
        others=list(zip(names[1:], found, strict=True)),
        curves=[figures.curve(logs), figures.curve(logs, "seconds") if timed else ""],
        settings=[(name, *(_written(of, name) for of in settings)) for name in differ],
    )


def _written(settings: dict[str, Any], name: str) -> str:
    """Return a setting as `nanodlm config` writes it, a dash where a run has none of that name."""
    return (
        yaml.safe_dump(settings[name], default_flow_style=True, width=math.inf).split("\n...")[0].strip()
        if name in settings
        else "–"
    )
