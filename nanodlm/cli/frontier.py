"""The command that holds samplers against their cost."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.checkpoints.finding import is_exported
from nanodlm.cli.arguments import Output
from nanodlm.cli.files import check_file, writing
from nanodlm.cli.models import Model, choose
from nanodlm.cli.store import OpenStore
from nanodlm.config import IF_ANY, Config, parse_address
from nanodlm.diffusion.kinds import Sampler
from nanodlm.errors import UsageError
from nanodlm.evaluation import fronts
from nanodlm.stages.lookup import named_judge
from nanodlm.stages.run import run_stage
from nanodlm.store import SCHEMA, Artifact, Store, fingerprint_of, new_attempt

Samplers = Annotated[tuple[Sampler, ...], Doc("What to try; by default all that the model has."), IF_ANY]
Steps = Annotated[
    tuple[int, ...], Doc("Numbers of steps; by default an eighth and half of the tokens of a text."), IF_ANY
]
Temperatures = Annotated[tuple[float, ...], Doc("What divides the logits.")]
Judge = Annotated[str, Doc("What scores: `twin`, trained where the store has none, or an autoregressive model's name.")]
Folder = Annotated[
    str, Doc("Folder for frontier.json, the numbers, and frontier.svg, the figure."), arg(metavar="FOLDER")
]


def frontier(
    model: Model = "",
    /,
    *,
    samplers: Samplers = (),
    steps: Steps = (),
    temperatures: Temperatures = (0.9, 1.0),
    num: Annotated[int, Doc("Texts of each.")] = 32,
    seed: Annotated[int, Doc("Seed of the draws.")] = 0,
    judge: Judge = "twin",
    out: Folder = "",
    store: OpenStore,
    console: Output,
) -> None:
    """Hold the quality of samplers against their cost, beside real text."""
    sound = temperatures and all(0 <= one < math.inf for one in temperatures) and 0 <= seed < 2**31
    if not sound or num < 2 or min((*steps, 1)) < 1:
        raise UsageError("--num must be 2 or more, --steps above 0, and --temperatures and --seed numbers from 0 on")
    if judge.startswith("hf:"):
        raise UsageError("samplers are judged by an autoregressive model of a store, or twin: not by one of the hub")
    check_file(out, is_folder=True)
    address = choose(model, store)
    if is_exported(address):
        raise UsageError(f"{address} is exported, without the text that samplers are held to: name a run of a store")
    store = Store(parse_address(address).store)
    trained = store.open(address)
    config = Config(**trained.manifest["config"]).replace(sample={"judge": judge})
    inputs = {name: store.open(f"{name}/{dict(trained.inputs)[name]}") for name in ("shard", "tokenizer")}
    with console.showing("twin") as emit:
        named = named_judge(config, store).get("twin")
        judging = named or run_stage("twin", config, store, inputs=inputs, emit=emit)[0]
    from nanodlm.checkpoints.loading import load, load_artifact
    from nanodlm.evaluation import frontier as frontiers
    from nanodlm.evaluation.judge import as_texts, check, held_out

    check(judging, inputs["shard"])
    (network, encoding), (reader, _) = load(address), load_artifact(judging)
    networks = [(network, list(frontiers.choices(network, samplers, steps, temperatures)))]
    if network.objective.kind != "autoregressive":
        networks.append((reader, list(frontiers.choices(reader, (), (), temperatures))))
    shape, end = (num, config.model.seq_len), encoding.eot_token
    real, cut = held_out(config, inputs["shard"], shape, end), partial(as_texts, config, end_of_text=end)
    how = {"shape": shape, "cut": cut, "seed": seed, "batch_size": config.eval.batch_size}
    with console.showing("frontier") as emit:
        found = frontiers.frontier(networks, reader, real, **how, emit=emit) | {"judge": judging.name}
    console.text(*fronts.described(found))
    if out:
        with writing(out):
            Path(out).mkdir(parents=True, exist_ok=True)
            fronts.write(found, Path(out))
        console.text(f"the numbers are in {out}/frontier.json", f"the figure is in {out}/frontier.svg")
    if parse_address(address).checkpoint is None:  # else it is of no finished model
        kept = keep(found, trained)
        console.text(f"{kept.name}: the report of the model's next `nanodlm run` shows it")
    console.json(**{**found, "model": address, "judge": judging.uri})


def keep(found: fronts.Found, trained: Artifact) -> Artifact:
    """Store what was measured of a model, each time as an artifact of its own, where the model's report finds it."""
    made_from = {"train": {"digest": trained.digest, "fingerprint": trained.fingerprint}}
    identity = {"schema": SCHEMA, "stage": "frontier", "version": 1, "inputs": made_from}
    identity["parameters"] = {"measured": fingerprint_of(found)}
    store, counts = trained.store, {"points": len(found["points"]), "num": found["num"]}
    with writing(store.uri()), new_attempt(store, "frontier", fingerprint_of(identity)) as attempt:
        fronts.write(found, attempt.path)
        return attempt.commit(identity=identity, metrics=counts, config=trained.manifest["config"])
