"""The command line: it finds the command, runs it, and turns errors into one line and an exit code.

    nanodlm run demo --train.lr 1e-3

Each command is a function of that name in a file beside this one, imported when it runs, so that `--help` is quick.
"""

import atexit
import contextlib
import difflib
import gc
import logging
import os
import sys
import traceback
import warnings
from importlib import import_module
from typing import NoReturn

from nanodlm.errors import NanodlmError, Stopped, UsageError, full_disk_named, redact

COMMANDS = {  # the file that holds it, and what it does
    "run": ("run", "text to samples: build what the store lacks, stage by stage"),
    "plan": ("run", "what `run` would build or reuse, why, and how long it takes"),
    "config": ("run", "the whole configuration, to be edited and given as PRESET"),
    "train": ("run", "the train stage alone, without Prefect"),
    "evaluate": ("run", "the evaluate stage alone"),
    "sample": ("run", "the sample stage alone"),
    "judge": ("run", "what samples cost an autoregressive model"),
    "launch": ("run", "a stage on a cluster: a Slurm job or a Kubernetes JobSet"),
    "generate": ("generate", "texts of a trained model: prompt it, fill in, watch"),
    "serve": ("serve", "the same on a page in the browser, and for scripts"),
    "score": ("score", "the bound of any text under a trained model"),
    "certify": ("certify", "prove the bound of a text by compression"),
    "export": ("export", "a folder to share: safetensors, tokenizer, card, PyTorch"),
    "compare": ("score", "in what runs differ, and whether their bounds do"),
    "bench train": ("bench", "speed and memory of updates, on random tokens"),
    "bench sample": ("bench", "speed of the sampler, with an untrained network"),
    "bench loader": ("bench", "speed of reading training rows"),
    "bench data": ("bench", "speed and memory of preparing data"),
    "bench frontier": ("frontier", "quality of samples against network calls and seconds"),
    "ls": ("store", "list the store's artifacts"),
    "show": ("store", "one artifact: where it came from, what it holds"),
    "verify": ("store", "check artifacts against their manifests, and repair them"),
    "gc": ("store", "remove what abandoned attempts left, and old results"),
    "copy": ("store", "copy artifacts to another store"),
    "rm": ("store", "remove an artifact, and with --recursive what was made from it"),
    "doctor": ("store", "check this machine and the store"),
}
HELP = f"""usage: nanodlm COMMAND [PRESET] [--store URL] [flags]

Diffusion language models, from text to samples.

commands:
{chr(10).join(f"  {name:<14}  {text}" for name, (_, text) in COMMANDS.items())}

PRESET is demo (the default), owt, owt-1b, shakespeare, text8, enwik8,
wikitext103, tinystories, lm1b, fineweb-edu, or a file: what `config` prints, or
a config.json that a run has written. `nanodlm COMMAND --help` lists a command's
flags. The store is --store, else $NANODLM_STORE, else data/store. --debug adds
the traceback to an error.
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 failed, 2 bad usage, 75 stopped by a signal after saving."""
    exits: list[int] = []
    if argv is None:
        argv = sys.argv[1:]
        atexit.register(_end, exits)  # what is registered first runs last
    debug, code = "--debug" in argv, 0
    gc.set_threshold(20_000)  # nothing that libraries make while they load is garbage: looking for it took a sixth
    warnings.formatwarning = lambda message, *_, **__: f"nanodlm: {message}\n"
    if not debug:  # the error that ends the command says in one line what threads of libraries would say of it
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = lambda _: None  # Orbax closes loops that its writes still report to
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        for said in ("coroutine .* was never awaited", "Error (reading|writing) persistent compilation cache"):
            warnings.filterwarnings("ignore", said)
    try:
        with full_disk_named("the file of standard output"):
            try:
                _have_home()
                _run([word for word in argv if word != "--debug"])
            except SystemExit as ended:  # after --help
                code = int(ended.code or 0)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("nanodlm: interrupted; finished stages and parts are kept: run again to continue", file=sys.stderr)
        code = Stopped.exit_code
    except BrokenPipeError:  # the reader of our output has gone
        pass
    except Exception as error:
        message, code = str(error), error.exit_code if isinstance(error, NanodlmError) else 1
        if not isinstance(error, NanodlmError):
            hint = "" if debug else " (add --debug for the traceback)"
            message = f"{type(error).__name__}: {redact(' '.join(message.split()))[:500]}{hint}"
        with contextlib.suppress(OSError):  # the exit code counts, also where nothing can be said
            print(redact(traceback.format_exc()) if debug else "", end="", file=sys.stderr)
            print(f"nanodlm: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written is dropped, before Python says so in words of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    jax = sys.modules.get("jax")  # which processes that train together have imported
    if code not in (0, Stopped.exit_code) and jax and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)  # not waiting for the others, which then end as well
    exits.append(code)
    sys.exit(code)


def _end(exits: list[int]) -> None:
    """End when all else has: Python would spend half a second on taking apart what JAX has loaded."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if exits:
        os._exit(exits[0])


def _have_home() -> None:
    """Name a home folder where there is none: without, libraries stop, or make a folder named `~`."""
    if os.path.expanduser("~") == "~":
        home = f"{import_module('tempfile').gettempdir()}/nanodlm-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(home, 0o700)
        if os.lstat(home).st_uid != os.getuid():
            raise UsageError(f"there is no home folder, and {home} is somebody else's: set HOME")
        os.environ["HOME"] = home


def _run(words: list[str]) -> None:
    if not set(words) - {"bench", "-h", "--help"}:
        print(HELP, end="")
        sys.exit(0 if {"-h", "--help"} & set(words) else UsageError.exit_code)
    if words[0] == "--version":
        print(import_module("importlib.metadata").version("nanodlm"))
        return
    length = 2 if words[0] == "bench" else 1
    command = " ".join(words[:length])
    if command not in COMMANDS:
        group = "bench " if length == 2 else ""
        known = [name.removeprefix(group) for name in COMMANDS if name.startswith(group)]
        near = [group + name for name in difflib.get_close_matches(words[length - 1], known)]
        advice = f"perhaps you meant {' or '.join(near)}" if near else f"choose one of {', '.join(known)}"
        raise UsageError(f"unknown command {command!r}: {advice}")
    from nanodlm.cli.arguments import parse

    function = getattr(import_module(f"nanodlm.cli.{COMMANDS[command][0]}"), words[length - 1])
    parse(command, function, words[length:])()
