"""What a report says, as sections of tables in plain text; Markdown is made of them here, HTML in `page`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from litlora.markdown import inline, table
from litlora.metrics import duration
from litlora.report.runs import Run, labels
from litlora.samples import Sample

NONE = "–"
# These do not change what is learned, or differ in every run.
NOT_COMPARED = frozenset(
    """out_dir overwrite dry_run quiet logger log_interval resume resume_override max_time save_interval
    keep_last""".split()
)


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    prose: bool = False  # texts rather than figures


@dataclass(frozen=True)
class Section:
    """`curves`: the plots go here. `folded`: only for who wants it; Markdown leaves it out."""

    title: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: bool = False
    folded: bool = False


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything there is to say of these runs; what none of them has is left out."""
    names = labels([run.path for run in runs])
    found = [_figures(runs, names), _settings(runs, names), _remarks(runs, names), Section("Curves", curves=True)]
    found += [_deltas(runs, names), _rounding(runs, names), _last_samples(runs, names), _all_samples(runs, names)]
    return [section for section in found if section.tables or section.notes or section.curves]


def _last(run: Run, name: str) -> float | None:
    values = run.points(name)[1]
    return float(values[-1]) if len(values) else None


def _extreme(run: Run, name: str, pick: Callable[..., float]) -> float | None:
    values = run.points(name)[1]
    return float(pick(values)) if len(values) else None


def _mean_rate(run: Run) -> float | None:
    tokens, seconds = _last(run, "total_tokens"), _last(run, "total_seconds")
    return tokens / seconds if tokens is not None and seconds else None


def _show(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _figures(runs: Sequence[Run], names: Sequence[str]) -> Section:
    head = ["run", "state", "steps", "best validation loss", "last validation loss", "last training loss", "time"]
    head += ["tokens/s", "peak memory", "matmul share", "trainable parameters"]
    rows = []
    for name, run in zip(names, runs, strict=True):
        seconds = run.figure("training_seconds", lambda run: _last(run, "total_seconds"))
        memory = run.figure("peak_memory_gb", lambda run: _extreme(run, "memory_gb", np.max))
        share = _extreme(run, "matmul_share", np.median)
        row = [name, "finished" if run.finished else "not finished", f"{run.steps:,}"]
        row.append(_show(run.figure("best_val_loss", lambda run: _extreme(run, "val_loss", np.min)), ".4f"))
        row.append(_show(run.figure("val_loss", lambda run: _last(run, "val_loss")), ".4f"))
        row.append(_show(run.figure("train_loss", lambda run: _last(run, "loss")), ".4f"))
        row.append(NONE if seconds is None or not 0 <= seconds < 1e12 else duration(seconds))
        row.append(_show(run.figure("tokens_per_second", _mean_rate), ",.0f"))
        row.append(NONE if memory is None else f"{memory:.2f} GB")
        row.append(_show(share, ".1%"))
        row.append(_show(run.trainable_parameters, ","))
        rows.append(row)
    kept = [place for place in range(len(head)) if place < 3 or any(row[place] != NONE for row in rows)]
    return Section("Figures", [Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])])


def _settings(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Of several runs those that differ, of one all."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key not in NOT_COMPARED))
    rows = [[key, *(run.settings.get(key, NONE) for run in runs)] for key in keys]
    if len(runs) == 1:
        return Section("Settings", [Table(["setting", names[0]], rows)] if rows else [])
    known = [place + 1 for place, run in enumerate(runs) if run.settings]  # of the others nothing can be said
    different = [row for row in rows if len({row[place] for place in known}) > 1]
    same = len(rows) - len(different)
    notes = [f"{same} other settings are the same in all of them."] if same and different else []
    if len(known) > 1 and not different:
        notes = ["All settings are the same."]
    return Section(
        "What differs in their settings", [Table(["setting", *names], different)] if different else [], notes
    )


def _rounding(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Validation loss by how the trained model is held; in brackets against the first of the run."""
    held = [(name, run) for name, run in zip(names, runs, strict=True) if run.rounding]
    variants = list(dict.fromkeys(variant for _, run in held for variant in run.rounding))

    def cell(run: Run, variant: str) -> str:
        if variant not in run.rounding:
            return NONE
        first = next(iter(run.rounding.values()))
        loss = run.rounding[variant]
        return f"{loss:.5f}" if variant == next(iter(run.rounding)) else f"{loss:.5f} ({loss - first:+.5f})"

    rows = [[variant, *(cell(run, variant) for _, run in held)] for variant in variants]
    title = "What rounding costs (validation loss)"
    return Section(title, [Table(["weights", *(name for name, _ in held)], rows)] if rows else [])


def _deltas(runs: Sequence[Run], names: Sequence[str]) -> Section:
    targets = list(dict.fromkeys(key for run in runs for key in run.metrics if key.startswith("delta_")))
    rows = []
    for target in targets:
        values = [_last(run, target) for run in runs]
        if any(value is not None for value in values):
            rows.append([target.removeprefix("delta_"), *(_show(value, ".3%") for value in values)])
    return Section("Change of the weights, ‖ΔW‖ / ‖W‖ at the end", [Table(["target", *names], rows)] if rows else [])


def _last_samples(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """The last answer of each run, by prompt."""
    prompts: dict[str, list[list[str]]] = {}
    for name, run in zip(names, runs, strict=True):
        last: dict[str, Sample] = {sample.prompt: sample for sample in run.samples}
        for sample in last.values():
            prompts.setdefault(sample.prompt, []).append([name, f"{sample.step:,}", sample.answer])
    tables = [Table(["run", "step", prompt], rows, prose=True) for prompt, rows in prompts.items()]
    return Section("Sample answers", tables)


def _all_samples(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """A table a run that has more than one."""
    tables = []
    for name, run in zip(names, runs, strict=True):
        rows = [[sample.prompt, f"{sample.step:,}", sample.answer] for sample in run.samples]
        tables += [Table([name, "step", "answer"], rows, prose=True)] if len(rows) > 1 else []
    return Section("All sample answers", tables, folded=True)


def _remarks(runs: Sequence[Run], names: Sequence[str]) -> Section:
    rows = [[name, problem] for name, run in zip(names, runs, strict=True) for problem in run.problems]
    return Section("Remarks", [Table(["run", "remark"], rows, prose=True)] if rows else [])


def to_markdown(parts: Sequence[Section], images: Sequence[tuple[str, str]] = (), missing: str = "") -> str:
    """`images`: (title, file name) of the plots beside the file; `missing`: what is said where there are none."""
    lines = ["# Finetuning runs", ""]
    for section in parts:
        if section.folded or (section.curves and not images and not missing):
            continue
        lines += [f"## {section.title}", ""]
        for part in section.tables:
            rows = [[inline(cell) for cell in row] for row in part.rows]
            lines += [table([inline(cell) for cell in part.head], rows, left=part.prose), ""]
        notes = [*section.notes, *([missing] if section.curves and missing else [])]
        notes += [f"![{title}]({file})" for title, file in images if section.curves]
        lines += [line for note in notes for line in (note, "")]
    return "\n".join(lines).rstrip("\n") + "\n"
