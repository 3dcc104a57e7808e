"""A report as one HTML page that needs nothing beside it: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from litlora.markdown import printable
from litlora.report.plots import Plot
from litlora.report.tables import Section, Table

# The policy refuses everything that is not in this file, should a text ever slip through unescaped.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="litlora">
<title>Finetuning runs</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --text: #222; --line: #d8dbe0; --soft: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --text: #ddd; --line: #3a3f47; --soft: #22262c; } }
body { background: var(--ground); color: var(--text); font: 15px/1.45 system-ui, sans-serif;
       max-width: 1180px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; vertical-align: top;
         white-space: nowrap; }
thead th { background: var(--soft); white-space: normal; }
td:nth-child(2) { min-width: 6ch; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--soft); }
.prose th, .prose td { text-align: left; }
.prose th:last-child, .prose td:last-child, td:first-child, th:first-child { white-space: pre-wrap;
         overflow-wrap: anywhere; min-width: 10ch; max-width: 80ch; }
.prose td:last-child { width: 100%; }
figure { margin: 1rem 0 1.6rem; } figcaption { font-size: .9rem; opacity: .8; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; margin: 1.5rem 0 .8rem; }
</style>
</head>
<body>
<h1>Finetuning runs</h1>
"""


def page(parts: Sequence[Section], plots: Sequence[Plot], missing: str = "") -> str:
    """`missing`: what is said where the plots would be."""
    lines = [HEAD]
    for section in parts:
        if section.curves and not plots and not missing:
            continue
        title = _text(section.title)
        lines.append(f"<details><summary>{title}</summary>" if section.folded else f"<h2>{title}</h2>")
        lines += [_table(part) for part in section.tables]
        lines += [f"<p>{_text(note)}</p>" for note in section.notes]
        if section.curves:
            lines += [_figure(plot) for plot in plots] or [f"<p>{_text(missing)}</p>"]
        lines += ["</details>"] if section.folded else []
    return "\n".join([*lines, "</body>", "</html>", ""])


def _text(text: str) -> str:
    return escape(printable(text, 5000))


def _table(part: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in part.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in part.rows)
    kind = ' class="prose"' if part.prose else ""
    return f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _figure(plot: Plot) -> str:
    light, dark = (base64.b64encode(picture).decode() for picture in (plot.light, plot.dark))
    title = _text(plot.title)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">\n'
        f'<img alt="{title}" src="data:image/png;base64,{light}"></picture>\n<figcaption>{title}</figcaption></figure>'
    )
