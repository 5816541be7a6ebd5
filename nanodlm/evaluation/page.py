"""Pages of one file each: templates in `pages/`, filled in with everything escaped but our own pictures."""

from typing import Any

from nanodlm.evaluation.figures import COLOURS


def render(template: str, **values: Any) -> str:
    """Return a page of `pages/`, which has its style and its pictures in itself; a value that is missing raises."""
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader, StrictUndefined

    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    loader = PackageLoader("nanodlm.evaluation", "pages")
    filled = Environment(loader=loader, lstrip_blocks=True, keep_trailing_newline=True, **options)
    return filled.get_template(template).render(colours=COLOURS, version=version("nanodlm"), **values)
