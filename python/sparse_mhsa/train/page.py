"""HTML pages that need no other file and no network."""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .checkpoint import write_text


def page(title: str, body: str) -> str:
    """A page with a heading.

    Args:
        title: text of the heading.
        body: HTML below it.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def prose(text: str) -> str:
    """Text as HTML; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, whose first column names the rows."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    lines = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def folded(summary: str, text: str) -> str:
    """A text that shows when its summary is clicked."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def counted(number: int, what: str) -> str:
    """A number of things: ``1 epoch``, ``2 epochs``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def write_page(path: Path, title: str, body: str) -> Path:
    """Write a `page` and return its path.

    Raises:
        TrainingError: the file cannot be written.
    """
    write_text(path, page(title, body))
    return path


STYLE = """
:root { --ink: #1d2433; --soft: #5b6475; --line: #e3e7ed; --accent: #0b7a75; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; background: #fff; min-height: 100vh; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p, li { color: var(--soft); max-width: 46rem; }
li { margin: .35rem 0; }
b, code { color: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem;
  margin: 1.5rem 0; }
.cards div { border: 1px solid var(--line); border-top: 3px solid var(--accent); border-radius: .4rem;
  padding: .9rem 1rem; }
.cards strong { display: block; font-size: 1.5rem; }
.cards span { color: var(--soft); font-size: .88rem; line-height: 1.35; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: 400; color: var(--soft); }
thead th { border-bottom: 2px solid var(--ink); }
figure { margin: 0; overflow-x: auto; }
figure svg, figure img { max-width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif; }
pre { background: #f5f7f9; padding: 1rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; margin-top: 1.5rem; color: var(--soft); }
"""
