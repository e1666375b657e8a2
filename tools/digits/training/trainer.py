"""Training of the digits model: one step, the loop, checkpoints and the log.

Everything random about a step follows from the seed and the step's number, so a run that is stopped
and resumed computes what one run computes. The learning rate falls linearly to zero over the
planned steps or, if a time budget is given, over whichever of steps and time is further along; the
log records the progress that was used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from forcing_kv.runtime_trt.bundle.atomic.files import append_line, replaced_file, write_file
from forcing_kv.runtime_trt.bundle.schema import parse_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.digits.training.config import TrainConfig
from forcing_kv.tools.digits.training.network import build_model
from forcing_kv.tools.digits.training.objective import Predictor, step_loss
from forcing_kv.tools.digits.training.optimiser import Average, build_optimisers
from forcing_kv.tools.digits.training.sequences import COMPRESSED_MIX, DENSE_MIX, make_batch


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    elapsed_s: float = 0.0

    def fraction(self, config: TrainConfig) -> float:
        """Share of the run that is done, 0..1, by steps or by time."""
        timed = self.elapsed_s / (60 * config.budget_minutes) if config.budget_minutes else 0.0
        return min(1.0, max(self.step / config.steps, timed))


@dataclass(frozen=True)
class Phase:
    """What kind of step the progress of a run calls for."""

    forcing: bool
    """Train on the model's own predictions."""
    long: bool
    """Long sequences."""
    compressed: bool
    """Mostly compressed caches."""


class Trainer:
    """A resumable run in a folder: `state.pt`, `log.jsonl`, `average.safetensors`.

    A step is the mean over `config.shards` batches. If a process group is up, its ranks share them:
    one single-threaded process a core beats one process with many threads where cores are shared
    with other work. The result is the same up to the order of summation.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.rank, self.world = 0, 1
        if distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.model = build_model(config.seed)
        self.optimisers = build_optimisers(self.model, config.lr)
        self.average = Average(self.model)
        self.predict = Predictor(self.model, config.precision, config.compile)
        self.progress = Progress()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._load()

    def _backward(self, index: int, phase: Phase) -> Tensor:
        """Accumulate the gradient of one shard's batch; returns loss sums and counts [4]."""
        config, forcing = self.config, phase.forcing
        mix = COMPRESSED_MIX if phase.compressed else DENSE_MIX
        batch = make_batch(config.seed, index, config.batch, phase.long, mix)
        loss, errors = step_loss(self.predict, batch, config.seed * 10**9 + index, forcing)
        (loss / config.shards).backward()
        start = torch.from_numpy(batch.query_chunks[:, batch.num_clean :] == 0)
        sums = (errors[start].sum(), start.sum(), errors[~start].sum(), (~start).sum())
        return torch.stack([value.float() for value in sums])

    def _reduce(self, sums: Tensor) -> Tensor:
        """Sum gradients, loss sums and elapsed times over the ranks; returns the loss sums."""
        if self.world == 1:
            return sums
        grads = [parameter.grad for parameter in self.model.parameters()]
        parts = [grad for grad in grads if grad is not None]
        assert len(parts) == len(grads)
        clock = torch.tensor([self.progress.elapsed_s / self.world])
        flat = torch.cat([*(part.flatten() for part in parts), sums, clock])
        distributed.all_reduce(flat)
        offset = 0
        for part in parts:
            part.copy_(flat[offset : offset + part.numel()].view_as(part))
            offset += part.numel()
        self.progress.elapsed_s = flat[-1].item()
        return flat[offset:-1]

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its log record."""
        config, step = self.config, self.progress.step
        fraction = self.progress.fraction(config)
        lr = config.lr * min(1.0, (step + 1) / config.warmup) * (1 - fraction)
        phase = Phase(
            forcing=fraction > config.forcing_start and step % 2 == 1,
            long=fraction > config.long_start and step % 3 == 2,
            compressed=fraction > config.compressed_start,
        )
        shards = range(self.rank, config.shards, self.world)
        sums = [self._backward(step * config.shards + shard, phase) for shard in shards]
        start, num_start, later, num_later = self._reduce(torch.stack(sums).sum(0)).tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update(step, config.average)
        self.progress.step += 1
        return {
            "progress": fraction,
            "lr": lr,
            "loss": (start + later) / (num_start + num_later),
            "loss_chunk0": start / max(num_start, 1),
            "loss_later": later / max(num_later, 1),
            "grad_norm": norm.item(),
        }

    def run(self, report: Callable[[Progress, dict[str, Any]], None], every: int = 50) -> None:
        """Train to the end, logging means over `every` steps and saving every fourth log."""
        window: list[dict[str, Any]] = []
        clock = time.monotonic()
        while self.progress.fraction(self.config) < 1.0:
            window.append(self.train_step())
            now = time.monotonic()
            self.progress.elapsed_s += now - clock
            clock = now
            if self.rank == 0 and self.progress.step % every == 0:
                report(self.progress, self._log(window))
                window = []
            if self.rank == 0 and self.progress.step % (4 * every) == 0:
                self.save()
        if self.rank == 0:
            self.save()

    def _log(self, window: list[dict[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {"step": self.progress.step}
        record["elapsed_s"] = round(self.progress.elapsed_s, 1)
        for key in ("progress", "lr"):
            record[key] = float(f"{window[-1][key]:.4g}")
        for key in ("loss", "loss_chunk0", "loss_later", "grad_norm"):
            record[key] = float(f"{sum(entry[key] for entry in window) / len(window):.4g}")
        append_line(self.folder / "log.jsonl", json.dumps(record))
        return record

    def save(self) -> None:
        """Write the state and the averaged weights, each by rename."""
        from safetensors.torch import save

        state = {
            "config": asdict(self.config),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        with replaced_file(self.folder / "state.pt") as file:
            torch.save(state, file)
        write_file(self.folder / "average.safetensors", save(self.average.state_dict()))

    def _load(self) -> None:
        """Go on from the folder's state.

        Raises:
            InputError: it is damaged, or of another model.
        """
        try:
            self._resume(torch.load(self.folder / "state.pt", weights_only=True))
        except Exception as error:
            # PyTorch's readers raise what they like for a damaged file.
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"{self.folder}: training cannot go on from state.pt and log.jsonl ({reason}); "
                "restore them, or train in another folder"
            ) from error

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        if self.rank == 0 and (self.folder / "log.jsonl").exists():
            self._cut_log()

    def _cut_log(self) -> None:
        """Drop log entries of steps that were lost with the process that made them."""
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        kept = [line for line in lines if parse_json(line)["step"] <= self.progress.step]
        write_file(log, "".join(kept).encode())
