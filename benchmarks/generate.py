"""Generation on exact model shapes with random weights: tokens/s beside what reading the weights allows, peers beside.

Each model runs in a process of its own, forked after the imports; every figure is on disk at once. The limit is the
bytes of weights that a token needs over the card's reading rate, which the same process measures by summing a buffer.

    python benchmarks/generate.py --models bf16 bf16-qv nf4 nf4dq fp8 --out DIR
    python benchmarks/generate.py --models bf16 --measure ragged --profile --out DIR
    python benchmarks/generate.py --tune --out DIR
    python benchmarks/generate.py --models --peers DIR_OF_PROGRAMS --peers_site SITE.tgz --out DIR
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to look for a card must not start CUDA before the forks
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import breakdown  # noqa: E402
import card  # noqa: E402
import from_command  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
import tune  # noqa: E402
from settings import ALL, QV, SIZES, config_of, random_rows  # noqa: E402
from train import Results, compiled_files, in_child, machine, process_age  # noqa: E402

from litlora.decode import generate, make_engine  # noqa: E402
from litlora.engine import State  # noqa: E402
from litlora.kv_cache import bytes_per_token  # noqa: E402
from litlora.load import Directory, RandomWeights, load_model  # noqa: E402
from litlora.lora import LoRA, adapt, lora_modules, lora_parameters  # noqa: E402
from litlora.metrics import peak_memory, reset_peak_memory  # noqa: E402
from litlora.model import Decoder  # noqa: E402
from litlora.ops import fastest  # noqa: E402
from litlora.precision import RunPrecision, pick_device  # noqa: E402
from litlora.sampling import Sampling  # noqa: E402

Row = dict[str, Any]
PROMPT, NEW = 128, 256
SAMPLED = Sampling(0.8, 50, seed=7)  # as the peers do, and our own default
GEN_JOBS = (
    "gen:hf:bf16:compile@150", "gen:hf:bf16@60", "gen:litgpt:bf16@60", "gen:litgpt:nf4@60",
    "gen:litgpt:bf16:compile@150",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What is generated from, and what it should reach on one H100 80 GB."""

    quantize: str | None = None
    quantize_head: bool = False
    lora: LoRA | None = None
    measures: tuple[str, ...] = ("decode", "steps")
    pdl: bool = True
    goal_share: float | None = None  # of the limit
    goal_speed: float | None = None  # tokens/s
    goal_of: tuple[str, float] | None = None  # this share of another model's
    goal_gb: float | None = None


MODELS = {
    "bf16": Model(measures=("decode", "steps", "prefill", "ragged"), goal_share=0.85),
    "bf16-qv": Model(lora=QV, measures=("decode",), goal_of=("bf16", 0.92)),
    "bf16-all": Model(lora=ALL, measures=("decode",)),
    "nf4": Model("bnb.nf4", measures=("decode",), goal_speed=420, goal_gb=4.6),
    "nf4dq": Model("bnb.nf4-dq", goal_speed=420, goal_gb=4.6),
    "nf4dq-head": Model("bnb.nf4-dq", quantize_head=True, measures=("decode",)),
    "fp8": Model("fp8", measures=("decode",), goal_share=0.80),
    "bf16-no-pdl": Model(measures=("decode",), pdl=False),
    "nf4dq-no-pdl": Model("bnb.nf4-dq", measures=("decode",), pdl=False),
}
STEPS = [(1, 128), (1, 4096), (1, 32768), (2, 256), (4, 256), (8, 256), (16, 256), (32, 256), (64, 256), (256, 256)]


class Bench:
    """One loaded model."""

    def __init__(self, name: str, model: Model, size: str, listing: Path | None) -> None:
        """Raises InputError for what this machine cannot do."""
        self.name, self.setting, self.device, self.config = name, model, pick_device("auto"), config_of(size)
        self.listing = listing
        cuda = self.device.type == "cuda"
        if cuda and not model.pdl:
            from litlora import decode_graph  # needs Triton

            decode_graph.has_pdl = lambda device: False
        precision = RunPrecision("bf16-true" if cuda else "32-true", model.quantize, self.device)
        self.reading = float(str(card.bandwidth(self.device, 0.3 if cuda else 0.02)["read_gb_s"]))
        torch.cuda.empty_cache()
        reset_peak_memory(self.device)
        weights = RandomWeights(self.config, torch.bfloat16, self.device)
        ops = fastest(self.device)[0]
        self.model = load_model(
            weights, precision.quantizer, dtype=precision.dtype, device=self.device, ops=ops,
            quantize_head=model.quantize_head,
        )  # fmt: skip
        if model.lora:
            adapt(self.model, model.lora)
            for module in lora_modules(self.model).values():
                torch.nn.init.normal_(module.lora_B.weight, std=0.02)
        self.model.eval()
        self.weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in self.model.parameters()}.values())
        linears = (module for path, module in self.model.named_modules() if path.endswith(("_proj", "lm_head")))
        self.read = sum(p.numel() * p.element_size() for module in linears for p in module.parameters())

    @property
    def limit(self) -> float:
        """tokens/s of one row whose weights are read once a token."""
        return float(1e9 * self.reading / self.read)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.config.vocab_size, (length,), generator=generator).tolist()


def decode(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Prompt 128, 256 new tokens, one row: the command's own loop, from the prompt to the last token."""
    new = args.new or NEW
    for kind, sampling in (("sampled", SAMPLED), ("greedy", Sampling())):

        def once(count: int, sampling: Sampling = sampling) -> tuple[float, float]:
            """Seconds to the first token, and to the last."""
            ids, marks = bench.prompt(PROMPT), [time.perf_counter()]
            for _ in generate(bench.model, [ids], sampling, max_new_tokens=count, stop_ids=()):
                marks.append(time.perf_counter())
            return marks[1] - marks[0], marks[-1] - marks[0]

        before, started = compiled_files(), time.perf_counter()
        once(4)
        warm, compiled = time.perf_counter() - started, compiled_files() - before
        reset_peak_memory(bench.device)
        first, whole = min((once(new) for _ in range(3)), key=lambda pair: pair[1])
        cache = bytes_per_token(bench.config, bench.model.model.embed_tokens.weight.dtype) * (PROMPT + new)
        peak = peak_memory(bench.device)
        rate = (new - 1) / (whole - first)
        yield {
            "measure": "decode",
            "kind": kind,
            "tokens_per_second": rate,
            "with_prompt_tokens_per_second": new / whole,
            "first_token_ms": 1e3 * first,
            "limit": bench.limit,
            "share": rate / bench.limit,
            "read_gb_s": bench.reading,
            "bytes_per_token": bench.read,
            "peak_gb": peak,
            "beside_weights_and_cache_gb": peak - (bench.weights + cache) / 1e9,
            "warm_up_seconds": warm,
            "kernels_compiled": compiled,
        }


def steps(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds of one step by rows and tokens of context: the card's part, `decode` has what the host adds."""
    for rows, context in STEPS:
        if args.tiny and rows * context > 4096:
            continue
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()  # what the rows before had
        room = bytes_per_token(bench.config, bench.model.model.embed_tokens.weight.dtype) * rows * (context + 200)
        if bench.device.type == "cuda" and room > torch.cuda.mem_get_info(bench.device)[0] - 2e9:
            yield {"measure": "steps", "rows": rows, "context": context, "skipped": "the cache does not fit"}
            continue
        run = stepper(bench.model, rows, context, bench.device)
        seconds = timed(run, bench.device, 40)
        row = {"measure": "steps", "rows": rows, "context": context, "ms": 1e3 * seconds}
        read = bench.read + rows * context * bytes_per_token(bench.config, bench.model.model.embed_tokens.weight.dtype)
        yield row | {"tokens_per_second": rows / seconds, "share": read / 1e9 / bench.reading / seconds}
        if bench.listing and (rows, context) in ((1, 128), (16, 256), (256, 256)):
            kernels, _ = breakdown.kernels_of(lambda run=run: [run() for _ in range(10)], bench.device)  # type: ignore[misc]
            with bench.listing.open("a") as stream:
                stream.write(
                    f"== {bench.name}, 10 steps of {rows} rows after {context} tokens, {1e3 * seconds:.3f} ms a step\n"
                )
                stream.write(breakdown.top(kernels))


def stepper(model: Decoder, rows: int, context: int, device: torch.device) -> Callable[[], None]:
    """A step of rows that all have `context` tokens, without their prompts: a cache of zeros takes as long to read."""
    engine = make_engine(model, rows, [context + 150] * rows)
    for row in range(rows):
        assert engine.admit(row, context + 150, 0)
    state = State(engine.width, model.config.vocab_size, Sampling(), device)
    state.upload([(context, 0, row, 1) for row in range(rows)])
    lengths = [context] * rows
    engine.settle(list(range(rows)), lengths)

    @torch.inference_mode()
    def run() -> None:
        engine.step(state, lengths)

    for _ in range(3):
        run()
    return run


def timed(run: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds of one."""
    breakdown.synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        run()
    breakdown.synchronize(device)
    return (time.perf_counter() - started) / count


def prefill(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """A long prompt, and its first token."""
    length = 4096 if not args.tiny else 200
    ids = bench.prompt(length)

    def once() -> None:
        next(generate(bench.model, [ids], Sampling(), max_new_tokens=1, stop_ids=()))

    once()
    reset_peak_memory(bench.device)
    seconds = timed(once, bench.device, 5)
    peak = peak_memory(bench.device)
    shapes = dict(bench.config.linear_shapes)
    head = shapes.pop("lm_head")
    layers, heads = bench.config.num_hidden_layers, bench.config.num_attention_heads * bench.config.head_dim
    flops = 2 * length * layers * sum(o * i for o, i in shapes.values()) + 2 * head[0] * head[1]
    flops += 4 * heads * layers * length * (length + 1) // 2
    rate = float(str(card.square(bench.device, False, 0.5 if bench.device.type == "cuda" else 0.01)["tflops"]))
    cache = length * bytes_per_token(bench.config, bench.model.model.embed_tokens.weight.dtype)
    yield {
        "measure": "prefill",
        "tokens": length,
        "ms": 1e3 * seconds,
        "tokens_per_second": length / seconds,
        "tflops": flops / seconds / 1e12,
        "matmul_tflops": rate,
        "share": flops / seconds / 1e12 / rate,
        "goal_share": 0.6,
        "beside_weights_and_cache_gb": peak - (bench.weights + cache) / 1e9,
    }


def ragged(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """512 prompts of Alpaca's lengths, up to 256 new tokens each; each stops at random (uniformly)."""
    count, new = (12, 16) if args.tiny else (512, NEW)
    data, chance = random_rows(count, bench.config.vocab_size, None), random.Random(0)
    prompts = [part.tolist() for part in np.split(data.flat_ids, data.offsets[1:-1])]
    ends = [chance.randint(1, new) for _ in range(count)]
    for slots in args.slots:
        list(generate(bench.model, prompts, SAMPLED, max_new_tokens=3, stop_ids=(), side_by_side=slots))  # compiles
        for attempt in range(args.runs):
            ended: set[int] = set()
            got, total = [0] * count, 0
            reset_peak_memory(bench.device)
            started = time.perf_counter()
            settings: Row = {"max_new_tokens": new, "stop_ids": (), "ended": ended, "side_by_side": slots}
            for row, _ in generate(bench.model, prompts, SAMPLED, **settings):
                got[row] += 1
                total += 1
                if got[row] == ends[row]:
                    ended.add(row)
            seconds = time.perf_counter() - started
            assert got == ends
            yield {
                "measure": "ragged",
                "slots": slots,
                "run": attempt + 1,
                "prompts": count,
                "prompt_tokens": sum(map(len, prompts)),
                "new_tokens": total,
                "seconds": seconds,
                "tokens_per_second": total / seconds,
                "goal_speed": 10_000,
                "peak_gb": peak_memory(bench.device),
            }


def beside(directory: Path, add: Callable[[Row], None]) -> None:
    """A real model on the CPU, one thread, greedy: ours and transformers' own loop by turns, the best of three."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    ids, new, device = list(range(100, 132)), 64, torch.device("cpu")
    weights = RunPrecision("32-true", None, device)
    ours = load_model(Directory.open(directory), weights.quantizer, dtype=torch.float32, device=device).eval()
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    prompt = torch.tensor([ids])

    def run_ours() -> list[int]:
        return [token for _, token in generate(ours, [ids], Sampling(), max_new_tokens=new, stop_ids=())]

    @torch.inference_mode()
    def run_theirs(**settings: Any) -> list[int]:
        settings |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new, "do_sample": False}
        return theirs.generate(prompt, min_new_tokens=new, pad_token_id=0, **settings)[0, len(ids) :].tolist()  # type: ignore[no-any-return]

    runs: dict[str, Callable[[], list[int]]] = {
        "ours": run_ours,
        "dynamic": run_theirs,
        "static": partial(run_theirs, cache_implementation="static"),
    }
    texts = {name: run() for name, run in runs.items()}
    best: dict[str, list[float]] = {name: [float("inf")] * 2 for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            clock, used = time.perf_counter(), time.process_time()
            run()
            taken = time.perf_counter() - clock, time.process_time() - used
            best[name] = [min(pair) for pair in zip(best[name], taken, strict=True)]
    rates = {f"{name}_tokens_per_second": new / wall for name, (wall, _) in best.items()}
    rates |= {f"{name}_tokens_per_cpu_second": new / cpu for name, (_, cpu) in best.items()}
    add({"measure": "beside transformers", **rates, "same_text": len(set(map(tuple, texts.values()))) == 1})


MEASURES = {"decode": decode, "steps": steps, "prefill": prefill, "ragged": ragged}


def figures(name: str, args: argparse.Namespace, results: Results) -> None:
    """Adds the model's rows, or one that says why there are none."""
    setting = MODELS[name]
    goals = {
        key: value for key in ("goal_share", "goal_speed", "goal_of", "goal_gb") if (value := getattr(setting, key))
    }
    about: Row = {"model": name, "size": args.size, "quantize": setting.quantize or "none"}
    try:
        started = time.perf_counter()
        bench = Bench(name, setting, args.size, results.kernels if args.profile else None)
        about |= {"weights_gb": bench.weights / 1e9, "adapter": sum(p.numel() for p in lora_parameters(bench.model))}
        load = time.perf_counter() - started
    except Exception as error:
        traceback.print_exc()
        results.add({**about, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        return
    for measure in args.measure or setting.measures:
        try:
            for row in MEASURES[measure](bench, args):
                results.add({**about, **(goals if measure == "decode" else {}), "load_seconds": load, **row})
        except Exception as error:
            traceback.print_exc()
            results.add({**about, "measure": measure, "error": f"{type(error).__name__}: {str(error)[:300]}"})


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS)[:6], help="empty: none")
    parser.add_argument("--measure", nargs="*", choices=MEASURES, help="instead of each model's own")
    parser.add_argument("--size", choices=SIZES, default="llama2-7b", help="tiny to try the script")
    parser.add_argument("--new", type=int, help="tokens to generate in `decode`, instead of 256")
    parser.add_argument("--slots", nargs="+", type=int, default=[256], help="rows side by side in `ragged`")
    parser.add_argument("--runs", type=int, default=2, help="of `ragged`")
    parser.add_argument("--profile", action="store_true", help="kernels of steps to kernels.txt")
    parser.add_argument("--tune", nargs="*", choices=tune.FORMATS, help="tiles of the linears; empty: all formats")
    parser.add_argument("--first_token", action="store_true", help="the command itself, from a checkpoint on disk")
    parser.add_argument("--beside", type=Path, help="a checkpoint to run on the CPU beside transformers")
    parser.add_argument("--peers", type=Path, help="directory with the peers' drive.py; run after the models")
    parser.add_argument("--peers_site", type=Path, help="archive of the peers' packages")
    parser.add_argument("--peers_jobs", nargs="+", default=GEN_JOBS)
    parser.add_argument("--peers_seconds", type=float, default=300)
    parser.add_argument("--seconds", type=float, default=560, help="no model starts after so many")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one model")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "out")))
    args = parser.parse_args(argv)
    args.tiny = args.size == "tiny"
    if args.peers and not args.peers_site:
        parser.error("--peers needs --peers_site")
    return args


def main(argv: list[str] | None = None) -> None:
    args, import_seconds = arguments(argv), process_age()
    results = Results(args.out)
    about = machine() | {"command": " ".join(["benchmarks/generate.py", *sys.argv[1:]])}
    results.add({"machine": about | {"import_seconds": round(import_seconds, 2)}})
    jobs: list[tuple[str, Callable[[], None]]] = []
    if args.tune is not None:
        jobs.append(("tune", partial(tune.run, args.tune or list(tune.FORMATS), results.add, args.tiny)))
    jobs += [(name, partial(figures, name, args, results)) for name in args.models]
    if args.first_token:
        jobs.append(("first token", partial(from_command.first_token, args.size, results.add)))
    if args.beside:
        jobs.append(("beside transformers", partial(beside, args.beside, results.add)))
    for name, work in jobs:
        left = args.seconds - process_age()
        ended = in_child(work, min(args.limit, left)) if left > 0 else f"no time left within {args.seconds:.0f} s"
        if ended:
            results.add({"model": name, "size": args.size, "error": ended})
    if args.peers:
        peers.run(args.peers, args.peers_site, args.out, args.peers_seconds, args.peers_jobs)


if __name__ == "__main__":
    main()
