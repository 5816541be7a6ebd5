"""What differs between two sets of settings, and what is wrong with one, in words."""

from typing import Any

from pydantic import ValidationError

from nanodlm.errors import redact


def differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return the fields in which two nested dicts differ, each with its two values; a field may be absent from one.

    >>> differences({"train": {"lr": 0.1, "seed": 1}}, {"train": {"lr": None, "seed": 1}})
    {'train.lr': '0.1 -> none'}
    """
    old, new = flat(saved), flat(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return {key: " -> ".join(_short(of[key]) if key in of else "absent" for of in (old, new)) for key in changed}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested dict, some of whose names may be dotted already, by dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def explain(error: BaseException, flag: str = "") -> str:
    """Say in one line what an error, of validation or any other, is about; a field's name follows `flag`."""
    if not isinstance(error, ValidationError):
        return redact(" ".join(str(error).split()))
    found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"{flag}{field}: {message}" if field else message for field, message in found)
