"""How the words after a command become the arguments of its function, with tyro.

A command's signature declares its arguments: before `/` those without a flag; `config` is PRESET with all its flags.
"""

import difflib
import inspect
import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Annotated, Any, NoReturn

import tyro
from pydantic import ValidationError
from tyro import _errors as tyro_errors  # its way to say what is wrong otherwise than in a box
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, PositionalMetavarFromFieldName, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from nanodlm.cli.console import Console
from nanodlm.config import Config, ScoreConfig, TextRequest, explain, load_config
from nanodlm.errors import UsageError
from nanodlm.precision import measured

Settings = Annotated[Config, arg(name="")]
Output = Annotated[Console, arg(name="")]

_registry, _flags = ConstructorRegistry(), []
_groups = [(f"{_name}.", _field.annotation) for _name, _field in Config.model_fields.items()]
_settings: Any
for _group, _settings in [*_groups, ("", ScoreConfig), ("", TextRequest)]:
    for _name, _field in _settings.model_fields.items():
        _flags.append(f"--{_group}{_name}")
        _field.description = " ".join((_field.description or "").split())  # --help breaks lines where the terminal ends


def parse(command: str, function: Callable[..., None], words: list[str]) -> Callable[[], None]:
    """Return the call of a command's function with what its words say; `--help` prints the help and exits."""
    parameters = inspect.signature(function).parameters
    preset, defaults = "", {}
    if "config" in parameters:
        name = "demo"
        if words and not words[0].startswith("-"):
            name, *words = words
        preset, defaults = " [PRESET]", {"config": load_config(name)}

    bind = wraps(function)(lambda *values, **named: partial(function, *values, **named))
    try:
        with tyro_errors.on_parse_error(partial(_refuse, command)):
            call = tyro.cli(
                partial(bind, **defaults),
                args=words,
                prog=f"nanodlm {command}{preset}",
                use_underscores=True,
                config=(FlagCreatePairsOff, PositionalMetavarFromFieldName),
                registry=_registry,
            )
    except ValidationError as error:
        raise UsageError(explain(error, "--")) from None
    if "config" in call.keywords and command not in ("config", "run"):  # `run` does it beside other things
        call.keywords["config"] = measured(call.keywords["config"])
    return call


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


def _refuse(command: str, event: tyro_errors.ParseErrorEvent) -> NoReturn:
    """Raise what is wrong with a command's words, in one line."""
    argument = getattr(event, "argument", None)
    if argument:
        value = getattr(event, "message", getattr(event, "value", "nothing")).rpartition(": ")[2]
        raise UsageError(f"{argument.lowered.name_or_flags[-1]} takes {argument.lowered.metavar}, not {value}")
    if isinstance(event, tyro_errors.InstantiationFailure):  # a group of settings does not accept its values
        failure: Any = sys.exception()  # tyro's, which it raised while it handled that of pydantic
        raise UsageError(explain(failure.__context__, f"--{failure.arg.rpartition('.')[2]}."))
    if isinstance(event, tyro_errors.MissingArgs):
        wrong = f"missing {' and '.join(str(missing.arg.lowered.metavar) for missing in event.missing_arguments)}"
    else:
        (word, *_) = event.tokens  # type: ignore[attr-defined]  # that are no arguments
        near = difflib.get_close_matches(word, _flags, 1)
        wrong = f"unknown argument {word}{f'; perhaps you meant {near[0]}' if near else ''}"
    raise UsageError(f"{wrong} (see `nanodlm {command} --help`)")
