"""Train the digits model: `python -m forcing_kv.tools.train_digits --out DIR`.

Stop it at any time and run the same command again to resume. The averaged weights stand in
`DIR/average.safetensors`, the log in `DIR/log.jsonl`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import run

from forcing_kv.export.request.flags import Int
from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed
from forcing_kv.tools.digits.training.config import TrainConfig
from forcing_kv.tools.ending import ended_by_signals

if TYPE_CHECKING:
    from forcing_kv.tools.digits.training.trainer import Progress


def train_command(*, out: Path, config: TrainConfig = TrainConfig(), processes: Int = 2) -> None:
    """Train the small model of moving handwritten digits (resumable).

    Args:
        out: Folder of the run; an unfinished run is resumed.
        config: what is trained, and for how long.
        processes: Single-threaded processes, 1 or 2.
    """
    with claimed(out):
        _train_all(out, config, processes)


def _train_all(out: Path, config: TrainConfig, processes: int) -> None:
    if processes == 1:
        _train(0, 1, config, out)
        return
    from torch.multiprocessing.spawn import spawn

    with scratch_folder() as meeting:
        started = spawn(_train, (processes, config, out, meeting), nprocs=processes, join=False)
        try:
            while not started.join():
                pass
        except BaseException:
            for process in started.processes:
                process.terminate()
            raise


def _train(
    rank: int, processes: int, config: TrainConfig, out: Path, meeting: Path | None = None
) -> None:
    """Run one process of the training; the processes meet in the folder `meeting`."""
    import torch
    from torch import distributed

    from forcing_kv.tools.digits.training.trainer import Trainer

    if meeting is not None:
        torch.set_num_threads(1)
        place = f"file://{meeting / 'rendezvous'}"
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
    trainer = Trainer(config, out)
    if rank == 0:
        _with_bar(trainer)
    else:
        trainer.run(lambda progress, record: None)


def _with_bar(trainer: Any) -> None:
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console) as bar:
        task = bar.add_task("training", total=1.0)

        def report(progress: Progress, record: dict[str, Any]) -> None:
            text = f"step {progress.step} chunk 0 {record['loss_chunk0']:.4f} later "
            text += f"{record['loss_later']:.4f}"
            bar.update(task, completed=progress.fraction(trainer.config), description=text)

        trainer.run(report)


if __name__ == "__main__":
    with ended_by_signals():
        run(train_command)
