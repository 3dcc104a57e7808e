"""A finetuning run under way: its model, files and totals, and what happens between two steps."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from litlora.commands.finetune_job import Job
from litlora.commands.finetune_report import Measures, card, live, report, row, summarize
from litlora.decode import Sampling, generate
from litlora.errors import InputError
from litlora.loggers import Loggers
from litlora.lora import lora_modules, lora_parameters
from litlora.memory import MicroBatch
from litlora.metrics import Progress, peak_memory, say
from litlora.model import Decoder, validation_loss
from litlora.packing import Batch
from litlora.peft_format import Record
from litlora.resume import Conditions, Totals
from litlora.run_files import MetricsFile, RunFiles
from litlora.samples import Sample, add_sample
from litlora.train import Step, TrainingError, undisturbed

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Training:
    """What a run works with, and what it has done so far."""

    job: Job
    fabric: Fabric
    decoder: Decoder
    model: nn.Module  # the decoder's loss, as Fabric wraps it
    optimizer: torch.optim.Optimizer
    micro: MicroBatch
    record: Record  # what litlora.json says; step and validation loss are put in when it is written
    conditions: Conditions
    files: RunFiles
    metrics: MetricsFile
    totals: Totals
    validation: list[Batch]
    progress: Progress
    measures: Measures
    loggers: Loggers
    saved_step: int | None = None  # the last one that reached the disk, in this session

    @property
    def ended(self) -> bool:
        return self.totals.ended(len(self.job.plan), self.job.patience)

    def evaluate(self) -> dict[str, float | None]:
        """The validation loss, and how far the adapter has moved the model, as columns of metrics.csv."""
        return {"val_loss": self.validate(), **self.measures.weight_changes()}

    def validate(self) -> float | None:
        """The validation loss and a sample answer; the adapter is kept where it is the best so far. The training's
        random numbers stay as they were."""
        totals = self.totals
        if not self.validation:
            return None
        with undisturbed(self.job.device):
            loss = validation_loss(self.model, self.validation, self.job.device)
            sample = self.sample() if math.isfinite(loss) else None
        answer = f"\n  {sample.prompt!r} -> {sample.answer!r}" if sample else ""
        self.progress.note(f"step {totals.step}: validation loss {loss:.4f}{answer}")
        if sample:
            write = partial(add_sample, self.files.out_dir, sample)
            self.attempt("the sample answer", write, then="goes on without it")
        totals.val_loss = loss if math.isfinite(loss) else None
        totals.validations_without_gain += 1
        better = totals.best_val_loss is None or loss < totals.best_val_loss
        save, then = partial(self.save_adapter, best=True), "goes on, and keeps the next better one"
        if better and math.isfinite(loss) and self.attempt("the best adapter", save, then=then):
            totals.best_val_loss, totals.best_step, totals.validations_without_gain = loss, totals.step, 0
        return loss

    def sample(self) -> Sample | None:
        """What the model now answers to the sample question, greedily."""
        if self.job.question is None:
            return None
        instruction, ids = self.job.question
        tokenizer = self.job.base.tokenizer
        with self.fabric.autocast():
            stop_ids, vocab_size = tokenizer.stop_ids, tokenizer.vocab_size
            answer = generate(
                self.decoder, [ids], Sampling(), max_new_tokens=64, stop_ids=stop_ids, vocab_size=vocab_size
            )
            text = tokenizer.decode([token for _, token in answer])
        return Sample(self.totals.step, instruction, text.strip())

    def log(self, step: Step, evaluation: Mapping[str, float | None]) -> None:
        """A step's row in metrics.csv and the loggers, and its line on the screen. Raises TrainingError after too many
        bad steps."""
        device = self.job.device
        self.totals.peak_memory_gb = max(self.totals.peak_memory_gb, peak_memory(device))
        lengths = self.job.data.dataset.lengths[self.job.plan[step.number - 1][1]]
        values = row(step, self.totals, device) | {"matmul_share": self.measures.matmul_share(step, lengths)}
        values |= evaluation
        self.metrics.write(values)
        self.loggers.write(values, step.number)
        self.progress.step(step.number, live(step, self.totals, device))
        if step.bad_rows:
            self.report_bad(step)

    def report_bad(self, step: Step) -> None:
        """Says which rows gave no number; after too many such steps in a row keeps the adapter and gives up."""
        limit, in_a_row = self.job.args.max_bad_steps, self.totals.bad_steps_in_a_row
        numbers = sorted(int(self.job.data.dataset.rows[index]) for index in step.bad_rows)
        what = f"the loss is {step.loss}, the gradient norm {step.grad_norm}: the step was not taken"
        where = f"step {step.number}, rows {numbers[:100]}{'…' if len(numbers) > 100 else ''}"
        self.progress.warn(f"warning: {what}\n  where:  {where}\n  count:  {in_a_row} in a row, {limit} end the run")
        if in_a_row >= limit:
            args, kept = self.job.args, f"the last good adapter, in {self.files.last}"
            if not self.attempt("the last adapter", self.save_last, then="ends"):
                kept = str(self.files.newest_checkpoint or "nothing")
            ways = ["a lower --learning_rate"]
            ways += ["--max_norm 1.0"] if args.max_norm is None else []
            ways += ["--precision 32-true"] if args.precision != "32-true" else []
            raise TrainingError(
                f"{in_a_row} steps in a row gave no finite loss or gradient\n"
                f"  where:  {where}\n  kept:   {kept}\n  fix:    {', or '.join(ways)}"
            )

    def save(self, *, final: bool = False) -> None:
        """The last adapter, and a checkpoint; once a step."""
        if self.saved_step == self.totals.step:
            return

        def write() -> None:
            self.save_last()
            self.files.save_checkpoint(
                self.totals,
                self.conditions,
                self.decoder,
                self.optimizer,
                self.job.device,
                self.metrics,
                self.job.args.keep_last,
            )

        then = "ends" if final else "goes on, and tries again at its next save"
        if self.attempt("the checkpoint", write, then=then):
            self.saved_step = self.totals.step

    def save_last(self) -> None:
        self.save_adapter(best=False)
        if not self.validation:
            self.save_adapter(best=True)
        elif not self.files.has_adapter:  # before the first validation, or the directory vanished: this is the best
            self.save_adapter(best=True)
            self.totals.best_val_loss, self.totals.best_step = self.totals.val_loss, self.totals.step

    def save_adapter(self, *, best: bool) -> None:
        record = replace(self.record, step=self.totals.step, val_loss=self.totals.val_loss)
        self.files.save_adapter(lora_modules(self.decoder), self.job.lora, record, self.job.save_dtype, best=best)

    def attempt(self, what: str, write: Callable[[], None], *, then: str) -> bool:
        """Whether `write` went well; where the disk is full or gone that is said, and what the run does then."""
        try:
            write()
        except (OSError, InputError) as error:
            reason: object = error
            if isinstance(error, OSError):
                reason = f"{error.strerror}: {error.filename or self.files.out_dir}"
            self.progress.warn(
                f"warning: {what} of step {self.totals.step} could not be saved\n  got:    {reason}\n"
                f"  kept:   {self.files.newest_checkpoint or 'no checkpoint yet'}\n  next:   the run {then}"
            )
            return False
        return True

    def require_saved(self) -> None:
        """Raises TrainingError where the disk did not take the run's end."""
        if self.saved_step != self.totals.step:
            raise TrainingError(
                f"the end of the run, step {self.totals.step}, could not be saved\n"
                f"  where:  {self.files.out_dir}\n"
                f"  kept:   {self.files.newest_checkpoint or 'no checkpoint'}\n"
                f"  fix:    free space, or make the directory writable, then {self.resume_command}"
            )

    @property
    def resume_command(self) -> str:
        return f"litlora finetune_lora --config {shlex.quote(str(self.files.settings_file))} --resume auto"

    def say_stopped(self, reason: str) -> None:
        say(f"stopped by {reason} after step {self.totals.step:,} of {len(self.job.plan):,}, which is saved")
        say(f"To go on: {self.resume_command}")

    def finish(self) -> None:
        """Looks at what was saved, and writes and says the closing figures. Raises TrainingError for an adapter of
        anything but numbers."""
        job, totals = self.job, self.totals
        if not all(torch.isfinite(parameter).all() for parameter in lora_parameters(self.decoder)):
            best = f"the best adapter, of step {totals.best_step}, in {self.files.out_dir}"
            raise TrainingError(
                "the last step has left values in the adapter that are not finite\n"
                f"  where:  {self.files.last}\n  kept:   {best if totals.best_step else 'nothing'}\n"
                "  fix:    a lower --learning_rate, and --overwrite true without --resume"
            )
        if totals.step < len(job.plan):
            say(f"early stopping: {totals.validations_without_gain} validations in a row without a better loss")
        self.files.check_saved(lora_modules(self.decoder), job.base.config, job.save_dtype)
        summary = summarize(totals, self.decoder, job.device)
        self.files.summarize(summary, card(job, self.record, summary))
        report(summary, job.args)

    def close(self) -> None:
        """Metrics and loggers, however the run ended."""
        self.metrics.close()
        self.loggers.close("success" if self.saved_step == self.totals.step else "failed")
