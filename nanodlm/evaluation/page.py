"""Pages of one file each: templates in `pages/`, filled in with everything escaped but our own pictures."""

import re
from typing import Any

from nanodlm.evaluation.figures import COLOURS

CONTROL = re.compile(r"[^\t\n\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # which pages cannot hold


def render(template: str, **values: Any) -> str:
    """Return a page of `pages/`, which has its style and its pictures in itself; a value that is missing raises."""
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader, StrictUndefined

    def shown(value: Any) -> Any:
        return CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value

    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "finalize": shown}
    loader = PackageLoader("nanodlm.evaluation", "pages")
    filled = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, **options)
    return filled.get_template(template).render(colours=COLOURS, version=version("nanodlm"), **values)
