"""Run a page's Python snippets in order, as one program, and show below each what it printed.

python docs/snippets.py docs/tour.md            # print the page with fresh output
python docs/snippets.py docs/tour.md --write    # and keep it
"""

import argparse
import contextlib
import io
import re
from pathlib import Path
from typing import Any

SNIPPET = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def with_output(page: str) -> str:
    """Return the page with what its snippets print, each in a `text` block below the snippet."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def run(match: re.Match[str]) -> str:
        code, printed = match[1], io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<snippet>", "exec"), names)
        output = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{code}```\n{output}"

    return SNIPPET.sub(run, page)


def main() -> None:
    """Read the command line, run the page, and print or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    page = with_output(options.page.read_text())
    if options.write:
        options.page.write_text(page)
    else:
        print(page, end="")  # noqa: T201


if __name__ == "__main__":
    main()
