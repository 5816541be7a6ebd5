"""How the words after a command become the arguments of its function, with tyro.

A command's signature declares its arguments: before `/` those without a flag; `config` is PRESET with all its flags.
"""

import contextlib
import difflib
import inspect
import io
import re
import sys
from collections.abc import Callable
from functools import partial, wraps
from itertools import takewhile
from typing import Annotated, Any, NoReturn

import tyro
from pydantic import ValidationError
from tyro import _errors as tyro_errors  # its way to say what is wrong otherwise than in a box
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, PositionalMetavarFromFieldName, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from nanodlm.cli.console import Console
from nanodlm.config import FILES, PRESETS, Config, explain, load_config
from nanodlm.errors import UsageError

Settings = Annotated[Config, arg(name="")]
Output = Annotated[Console, arg(name="")]

_registry = ConstructorRegistry()
for _group in Config.model_fields.values():  # so that --help breaks lines where the terminal ends
    for _field in _group.annotation.model_fields.values():  # type: ignore[union-attr]
        _field.description = " ".join((_field.description or "").split())


def parse(command: str, function: Callable[..., None], words: list[str]) -> Callable[[], None]:
    """Return the call of a command's function with what its words say; `--help` prints the help and exits."""
    parameters = inspect.signature(function).parameters
    own = [name.upper() for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    preset, defaults = "", {}
    if "config" in parameters:
        name, words = "demo", [*words]
        for word in takewhile(lambda word: not word.startswith("-"), words):
            file = word.endswith(FILES) and not word.endswith("manifest.json")  # which is an artifact's
            if word in PRESETS or word.startswith("{") or file:
                words.remove(name := word)
                break
        preset, defaults = " [PRESET]", {"config": load_config(name)}

    bind = wraps(function)(lambda *values, **named: partial(function, *values, **named))

    def refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
        if isinstance(event, tyro_errors.UnrecognizedArgs):
            raise UsageError(_unknown(event.tokens[0], command, function))
        if isinstance(event, tyro_errors.MissingArgs):
            told = [str(missing.arg.field.helptext).strip(" .") for missing in event.missing_arguments]
            texts = ", and ".join(text[:1].lower() + text[1:] for text in told)
            raise UsageError(f"nanodlm {command} {' '.join(own)}{preset}: name {texts}")
        raise UsageError(_wrong_value(event))

    try:
        with tyro_errors.on_parse_error(refuse):
            return tyro.cli(
                partial(bind, **defaults),
                args=words,
                prog=f"nanodlm {command}{preset}",
                use_underscores=True,
                config=(FlagCreatePairsOff, PositionalMetavarFromFieldName),
                registry=_registry,
            )
    except ValidationError as error:
        raise UsageError(_explain(error, "--")) from None


@_registry.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """Let a setting that is True or False stand alone, which means True: `--exp.resume`."""
    if info.type is not bool or FlagConversionOff not in info.markers:
        return None

    def read(words: list[str]) -> bool:
        if words not in ([], ["True"], ["False"]):
            raise ValueError(f"neither True nor False: {words[0]!r}")
        return words != ["False"]

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[{True,False}]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _wrong_value(event: tyro_errors.ParseErrorEvent) -> str:
    argument = getattr(event, "argument", None)
    if argument is None:  # a group of settings does not accept its values
        failure: Any = sys.exception()  # tyro's, which it raised while it handled that of pydantic
        return _explain(failure.__context__, f"--{failure.arg.rpartition('.')[2]}.")
    flag, takes = argument.lowered.name_or_flags[-1], argument.lowered.metavar.removeprefix("{None}|").strip("[]")
    if isinstance(event, tyro_errors.InvalidChoice):
        choices = takes.strip("{}").removeprefix("None,").replace(",", ", ")
        return f"{flag}: invalid choice {event.value!r}: choose one of {choices}"
    if isinstance(event, tyro_errors.InstantiationFailure):
        return f"{flag} takes {takes}, not {event.message.rpartition(': ')[2]}"
    return f"{flag} needs a value: {takes}"


def _explain(error: ValidationError, prefix: str) -> str:
    return (prefix if error.errors()[0]["loc"] else "") + explain(error)


def _unknown(word: str, command: str, function: Callable[..., None]) -> str:
    """Say what to do about a word that is no argument."""
    remedy = f"(`nanodlm {command} --help` lists the flags)"
    if word.startswith("-"):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
            parse(command, function, ["--help"])
        flags = re.findall(r"--[\w.]+", told.getvalue())
        near = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), flags, 1)
        return f"unknown flag {word}{f'; perhaps you meant {near[0]}' if near else ''} {remedy}"
    if "config" in inspect.signature(function).parameters and "/" not in word:
        load_config(word)  # says what a preset is, unless this is one
        return f"the preset {word} must come first, before all flags, and there is only one {remedy}"
    return f"there is one word too many: {word} {remedy}"
