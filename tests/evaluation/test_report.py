"""The report: one file that anybody can read, with every number, and with what an artifact has of what is optional."""

import dataclasses
import html
import json
import re
import shlex
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import nanodlm
from nanodlm.cli.arguments import parse
from nanodlm.cli.run import run
from nanodlm.data import tokenizer
from nanodlm.evaluation import figures
from nanodlm.evaluation.artifacts import texts_of
from nanodlm.stages import run as stages_run
from nanodlm.store import Artifact, Store, new_attempt
from tests.support.helpers import committed, fill
from tests.support.training import tiny

CONFIG = tiny(exp={"run_name": "a <b>bold</b> run"}, sample={"prompt": "<i>&"})


@pytest.fixture(scope="module")
def made(trained: Artifact, models: Store) -> dict[str, Artifact]:
    found = {name: stages_run.run_stage(name, CONFIG, models)[0] for name in ("evaluate", "sample", "report")}
    return {"train": trained, **found}


@pytest.fixture(scope="module")
def page(made: dict[str, Artifact]) -> str:
    return told(made["report"])


def told(report: Artifact) -> str:
    """A report's page, with plain spaces where no line may break."""
    return report.file("report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")


def tree(page: str) -> ET.Element:
    """A page as XML, which it is as well but for its first line and its scripts."""
    return ET.fromstring(re.sub(r"<script.*?</script>", "", page.removeprefix("<!doctype html>"), flags=re.DOTALL))


def with_other(artifact: Artifact, store: Store, files: dict[str, str | None], **metrics: Any) -> Artifact:
    """An artifact of another store, with other files, or without those of None, and other metrics."""
    old = {file["path"]: artifact.file(file["path"]).read_bytes() for file in artifact.manifest["files"]}
    new = {name: text.encode() for name, text in files.items() if text is not None}
    identity = {name: artifact.manifest[name] for name in ("schema", "stage", "version", "parameters", "inputs")}
    with new_attempt(store, artifact.stage, artifact.fingerprint) as attempt:
        fill(attempt, {name: content for name, content in (old | new).items() if files.get(name, "") is not None})
        return attempt.commit(
            identity=identity, metrics={**artifact.metrics, **metrics}, config=artifact.manifest["config"]
        )


def report_of(store: Store, **inputs: Artifact) -> str:
    made, _ = stages_run.run_stage("report", CONFIG, store, inputs=inputs, rebuild=True)
    return told(made)


def test_people_are_shown_no_end_of_text_marks(store: Store) -> None:
    line = json.dumps({"text": f"one{tokenizer.END_OF_TEXT}two"})
    assert texts_of(committed(store, {"samples.jsonl": line.encode()}, "sample")) == ["one\n\ntwo"]


def test_the_page_is_one_small_file_that_fetches_nothing_and_is_escaped(page: str) -> None:
    assert len(page.encode()) < 400_000
    assert not re.findall(r"https?://|\bsrc=|@import|<link|url\((?!#[pm])", page)
    assert "default-src 'none'" in page
    assert '<meta name="viewport" content="width=device-width' in page
    assert "<b>bold" not in page
    assert "<i>&" not in page
    assert "&lt;i&gt;&amp;" in page


def test_the_page_is_well_formed_and_can_be_heard(page: str) -> None:
    tags = list(tree(page).iter())
    levels = [int(tag.tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag.tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(tag.attrib["aria-label"] and tag.attrib["role"] == "img" for tag in tags if tag.tag == "svg")
    ids = [tag.attrib["id"] for tag in tags if "id" in tag.attrib]
    assert len(ids) == len({*ids})
    assert {name[1:] for name in re.findall(r'(?:href="|url\()(#\w+)', page)} <= {*ids}


def test_the_page_says_every_number_with_its_unit(made: dict[str, Artifact], page: str) -> None:
    said, m, t = " ".join(" ".join(tree(page).itertext()).split()), made["evaluate"].metrics, made["train"].metrics
    low, high = m["val_bits_per_byte_interval"]
    for text in (
        f"{m['val_bits_per_byte']:.3f} bits per byte 95% interval {low:.3f} to {high:.3f}",
        f"{m['val_nats_per_token']:.4f} ± {m['val_nats_per_token_stderr']:.4f}",
        f"unigram entropy {m['val_unigram_bits_per_byte']:.4f}",
        f"An absorbing model of {t['parameters']:,} parameters",
        "12 updates",
        f"{t['train_tokens_per_second']:,.0f} tokens/s",
        "never trained on",
        "2 texts, not picked, of the sampler spread",
        t["parameters_sha256"],
        *(artifact.fingerprint for name, artifact in made.items() if name != "report"),
    ):
        assert text in said
    assert f"{tiny().exp.val_rows} validation rows" in said


def test_the_command_on_the_page_runs_the_same(page: str) -> None:
    (code,) = re.findall(r"<pre><code>(.*?)</code>", page, re.DOTALL)
    _, command, *words = shlex.split(html.unescape(re.sub("<[^>]*>", "", code)))
    call: Any = parse(command, run, words)
    assert (command, call.keywords["config"]) == ("run", CONFIG)


def test_every_colour_can_be_read_in_both_schemes_and_pictures_have_no_others(page: str) -> None:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for scheme in (0, 1):
        of = {name: light(pair[scheme]) for name, pair in figures.COLOURS.items()}
        for name in of.keys() - {"ground", "card", "line"}:
            for ground in ("ground", "card"):
                low, high = sorted((of[name], of[ground]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground, scheme)
    assert "@media screen and (prefers-color-scheme: dark)" in page
    pictures = "".join(re.findall("<svg.*?</svg>", page, re.DOTALL))
    assert pictures.count("<svg") >= 6
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", pictures).replace("#p", ""))


def test_what_earlier_artifacts_lack_is_left_out_and_shown_when_it_is_there(
    made: dict[str, Artifact], store: Store, tmp_path: Path, page: str
) -> None:
    headings = ("Where the bound comes from", "Beside held-out text", "nanodlm-steps")
    assert all(heading in page for heading in headings)
    profile = {"by_position": [5.0, 4.5, 4.0], "by_noise": {"masked_share": [0.5, 1.0], "nats_per_token": [3.0, 6.0]}}
    evaluate = with_other(made["evaluate"], store, {"bound_profile.json": json.dumps(profile)})
    texts = {"texts": 2, "tokens": 64, "entropy": 3.25, "entropy_stderr": 0.5, "self_bleu": None}
    quality = {"samples": texts, "held_out": {**texts, "entropy": 4.5}, "searched_tokens": 1}
    slider = {"slider.html": "<p id='slider' class='nanodlm-steps'>it moves</p>"}
    sample = with_other(made["sample"], store, slider, quality=quality)
    more = report_of(store, train=made["train"], evaluate=evaluate, sample=sample)
    assert all(heading in more for heading in headings)
    assert "A token costs 3.00 nats where 50% of the row is noise and 6.00 where 100% is." in more
    assert "A token costs 5.00 nats at the first place of the row and 4.00 at the last." in more
    assert slider["slider.html"] in more
    assert re.search(r">entropy</th><td[^>]*>3.250 ± 0.500</td><td[^>]*>4.500 ± 0.500</td>", more)
    # Earlier trainings have no seconds, and a store may have lost what came before.
    old = [
        {k: v for k, v in r.items() if k != "seconds"} for r in json.loads(made["train"].file("logs.json").read_text())
    ]
    early = Store(str(tmp_path / "early"))
    train = with_other(made["train"], early, {"logs.json": json.dumps(old)})
    evaluate = with_other(made["evaluate"], early, {"bound_profile.json": None})
    sample = with_other(made["sample"], early, {"slider.html": None}, quality={})
    less = report_of(early, train=train, evaluate=evaluate, sample=sample)
    assert not any(heading in less for heading in headings)
    assert ("seconds of updates" in page, "seconds of updates" in less) == (True, False)


def test_both_reports_tell_each_measure_of_the_samples_once_with_its_error(
    made: dict[str, Artifact], page: str
) -> None:
    m, plain = made["sample"].metrics["quality"], made["report"].file("report.md").read_text()
    rows = re.findall(r'<th scope="row">([^<]*)</th><td class="n">([^<]*)</td><td class="n">([^<]*)</td><td>', page)
    assert [name for name, *_ in rows] == [
        "entropy", "pooled entropy", "distinct 1", "distinct 2", "distinct 3", "repetition", "self BLEU",
        "copied",
    ]  # fmt: skip
    keys = [name for name in m["samples"] if f"{name}_stderr" in m["samples"]]
    for (name, *values), key in zip(rows, keys, strict=True):
        for shown, side in zip(values, (m["samples"], m["held_out"]), strict=True):
            error = side[f"{key}_stderr"]  # of two texts there is none of BLEU, which compares texts
            assert shown == f"{side[key]:.3f}" + (f" ± {error:.3f}" if error is not None else "")
        assert re.search(rf"    {name} +{values[0]} +{values[1]} ", plain)
    caption = f"Samples: 2 texts of together {2 * (32 - len('<i>&'))} tokens. Held out: 2 texts of together"
    assert (caption in " ".join(page.split()), caption in " ".join(plain.split())) == (True, True)
    assert "stderr" not in page


@pytest.mark.parametrize("levels", [None, {"masked_share": [0.25, 0.75], "nats_per_token": [None, 2.0]}])
def test_a_profile_without_noise_or_with_empty_levels_is_drawn_as_far_as_it_goes(
    made: dict[str, Artifact], store: Store, levels: dict[str, Any] | None
) -> None:
    profile = {"bound_profile.json": json.dumps({"by_position": [None, 2.5, 2.0], "by_noise": levels})}
    page = report_of(store, **{**made, "evaluate": with_other(made["evaluate"], store, profile)})
    assert "A token costs 2.50 nats at the first place of the row" in page
    assert ("share of the row that is noise" in page) == (levels is not None)


def test_an_autoregressive_model_of_the_same_shards_has_a_row(made: dict[str, Artifact], store: Store) -> None:
    one = made["evaluate"]
    config = CONFIG.replace(objective={"kind": "autoregressive"}, exp={"run_name": "left to right"}).model_dump(
        mode="json"
    )
    others: list[tuple[str, Any, dict[str, Any]]] = [
        ("a" * 64, config, {"val_bits_per_byte": 1.2345}),
        ("b" * 64, config, {"scored_tokens": 7}),
        ("c" * 64, None, {}),  # which says nothing of its settings
    ]
    for fingerprint, settings, changed in others:
        manifest = {**one.manifest, "config": settings}
        other = dataclasses.replace(one, manifest={**manifest, "fingerprint": fingerprint})
        with_other(other, store, {}, **changed)
    evaluate = with_other(one, store, {})
    page = report_of(store, train=made["train"], evaluate=evaluate, sample=made["sample"])
    assert page.count("autoregressive: left to right") == 1
    assert "1.2345" in page


def test_curves_of_equal_records_are_equal_and_records_without_numbers_leave_none() -> None:
    records = [{"step": i, "nats_per_token": 5.0 / i, "val_nats_per_token": None} for i in range(1, 100)]
    assert figures.curve({"a": records}) == figures.curve({"a": records}) != figures.curve({"b": records})
    assert "a: 3.75 to 0.05" in figures.curve({"a": [*records, {"step": 100, "nats_per_token": None}]})
    assert ">a $x_1$</text>" in figures.curve({"a $x_1$": records, "b": records}), "a name, and no formula"
    for nothing in ([], [{"step": 1, "nats_per_token": None}]):
        assert figures.curve({"a": nothing}) == ""


def test_equal_runs_have_equal_digests_whatever_is_logged_or_read_by_nothing(
    trained: Artifact, models: Store, store: Store
) -> None:
    digests: list[dict[str, str]] = []
    other = tiny(exp={"log_every": 4, "save_every": 6}, schedule={"exponent": 3.0})
    for config, where in ((tiny(), models), (other, store)):
        made = {"train": nanodlm.train(config, where.uri())}
        for name in ("evaluate", "sample"):
            made[name], _ = stages_run.run_stage(name, config, where)
        inputs = made if where is models else dict(reversed(made.items()))
        made["report"], _ = stages_run.run_stage("report", config, where, inputs=dict(inputs))
        digests.append({name: artifact.digest for name, artifact in made.items()})
        digests[-1] |= {f"of {stage}": where.open(f"{stage}/{fingerprint}").digest for stage, fingerprint in where}
        page = made["report"].file("report.md").read_text()
        assert page.index("    train ") < page.index("    evaluate ") < page.index("    sample ")
    assert {name: digest for name, digest in digests[0].items() if not name.startswith("of ")}.items() <= digests[
        1
    ].items()


HOSTILE = """# heading
<img src=x onerror=alert(1)> ![image](https://example.org/x.png) [link](https://example.org)
| a | b |
---
===
- item
7. item
    code
```
~~~
*bold* _it_ `code` &amp; $x$ \\ https://example.org www.example.org <https://example.org> ## Samples
[a]: https://example.org"""


def test_names_and_samples_break_nothing_in_the_markdown_report(trained: Artifact, models: Store, store: Store) -> None:
    config = tiny(exp={"run_name": HOSTILE}, sample={"prompt": "<b>&"})
    inputs = {"train": trained} | {n: stages_run.run_stage(n, config, models)[0] for n in ("evaluate", "sample")}
    inputs["sample"] = committed(store, {"samples.jsonl": json.dumps({"text": HOSTILE}).encode()}, "sample")
    made = models.open(f"shard/{trained.manifest['inputs']['shard']['fingerprint']}")
    card = {**json.loads(made.file("card.json").read_text()), "examples": [HOSTILE], "frequent": [[HOSTILE, 1]]}
    for files in ({"card.json": json.dumps(card).encode()}, {}):  # the second as earlier versions made it
        shard = committed(store, files, "shard", f"f{len(files)}")
        lineage = {"shard": {"digest": shard.digest, "fingerprint": shard.fingerprint}}
        manifest = {**inputs["evaluate"].manifest, "inputs": lineage, "digest": shard.fingerprint}
        inputs["evaluate"] = dataclasses.replace(inputs["evaluate"], store=store, manifest=manifest)
        report, _ = stages_run.run_stage("report", config, store, inputs=inputs)
        check_markdown(report, ["Report", "Samples", *(["Data"] if files else [])])


def check_markdown(report: Artifact, headings: list[str]) -> None:
    text = report.file("report.md").read_text()
    tokens = list(MarkdownIt("gfm-like", {"linkify": False}).parse(text))
    assert {token.type for token in tokens} == {"heading_open", "inline", "heading_close", "code_block"}
    assert [token.content for token in tokens if token.type == "inline"] == headings
    assert "".join(tokens[-1].content.split()).endswith("".join(HOSTILE.split())), "but for where lines end"
    assert text.index("## Samples") < text.index("    # heading")
    assert html.escape(HOSTILE) in report.file("report.html").read_text()
