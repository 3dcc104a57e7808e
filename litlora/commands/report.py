"""`litlora report out/*`: finetuning runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from litlora.checkpoint import atomic_file, require_writable, write_text
from litlora.errors import InputError
from litlora.metrics import say
from litlora.report import draw, is_run, page, read_run, sections, to_markdown

MISSING = "Plots need matplotlib: pip install matplotlib"


@dataclass(frozen=True)
class Args:
    """Put finetuning runs side by side: `litlora report out/*` prints Markdown; --out_dir also makes a page with plots.

    Args:
        runs: the runs' output directories; what is none among several is left out, and said so
        out_dir: where report.md, report.html (one file, readable offline) and the plots as PNGs are written
        overwrite: write into an out_dir that is not empty, over an earlier report
    """

    runs: tuple[Path, ...] = ()
    out_dir: Path | None = None
    overwrite: bool = False


def run(args: Args) -> None:
    """Prints the report on stdout. Raises InputError where no directory is a run."""
    if args.out_dir is not None:
        require_writable(args.out_dir, overwrite=args.overwrite)
    runs = [read_run(path) for path in find_runs(args.runs)]
    parts = sections(runs)
    if args.out_dir is None:
        print(to_markdown(parts), end="")
        say("note: --out_dir DIR writes the report there, with plots and as one HTML page")
        return
    args.out_dir.mkdir(parents=True, exist_ok=True)
    plots = draw(runs)
    missing = MISSING if plots is None else ""
    if missing:
        say(f"note: no plots. {missing}")
    images = []
    for plot in plots or []:
        with atomic_file(args.out_dir / f"{plot.name}.png") as stream:
            stream.write(plot.light)
        images.append((plot.title, f"{plot.name}.png"))
    write_text(args.out_dir / "report.md", to_markdown(parts, images, missing))
    write_text(args.out_dir / "report.html", page(parts, plots or [], missing))
    print(args.out_dir / "report.html")


def find_runs(paths: tuple[Path, ...]) -> list[Path]:
    """Those that are runs, each once. Raises InputError: none given, one that does not exist, none that is a run."""
    if not paths:
        raise InputError("no run to report on", wanted="the output directories of runs: litlora report out/*")
    found: dict[Path, Path] = {}
    others: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError("this directory does not exist", where=path, fix="the output directory of a run")
        if is_run(path):
            found.setdefault(path.resolve(), path)
        else:
            others.append(path)
    if not found:
        raise InputError(
            "none of these is a finetuning run",
            got=", ".join(map(str, others[:5])) + (" …" if len(others) > 5 else ""),
            wanted="directories with hyperparameters.yaml or metrics.csv, as litlora finetune_lora leaves them",
        )
    for path in others:
        children = sorted(path.iterdir()) if path.is_dir() else []
        inside = [child for child in children if child.is_dir() and is_run(child)]
        hint = f" ({inside[0]} is one)" if inside else ""
        say(f"note: not a finetuning run, left out: {path}{hint}")
    return list(found.values())
