"""Finetuning runs side by side: read (`runs`), told (`tables`), drawn (`plots`), as Markdown or one HTML page."""

from litlora.report.page import page
from litlora.report.plots import Plot, draw
from litlora.report.runs import Run, is_run, read_run
from litlora.report.tables import Section, sections, to_markdown

__all__ = ["Plot", "Run", "Section", "draw", "is_run", "page", "read_run", "sections", "to_markdown"]
