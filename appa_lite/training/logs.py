"""What a training tells: a progress bar, metrics.csv and TensorBoard. Only the main process tells."""

import csv
import sys
from pathlib import Path

from tqdm import tqdm

COLUMNS = ("step", "samples", "seconds", "phase", "metric", "value")


class RunLog:
    """Writes ``metrics.csv`` (tidy: one row per step and metric) and TensorBoard files in the run directory.

    A resumed run drops what an interrupted one wrote after its last checkpoint.
    """

    def __init__(self, run: Path, step: int, total: float, done: float, unit: str, enabled: bool = True):
        self.enabled = enabled
        interval = 0.5 if sys.stderr.isatty() else 30.0
        form = "{l_bar}{bar:20}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        self.bar = tqdm(total=total, initial=done, unit=unit, disable=not enabled, mininterval=interval, bar_format=form, file=sys.stderr)
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self.path = run / "metrics.csv"
        rows = _rows_until(self.path, step)
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])

    def write(self, step: int, samples: int, seconds: float, phase: str, values: dict[str, float]) -> None:
        """Adds one row per value; ``phase`` is 'train' or 'validation'."""
        if not self.enabled:
            return
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows([step, samples, round(seconds, 3), phase, name, value] for name, value in values.items())
        for name, value in values.items():
            self.board.add_scalar(f"{phase}/{name}", value, step)

    def progress(self, done: float, text: str) -> None:
        """Moves the bar to ``done`` and shows ``text`` beside it."""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(max(0.0, min(done, self.bar.total) - self.bar.n))

    def close(self) -> None:
        self.bar.close()
        if self.enabled:
            self.board.close()


def _rows_until(path: Path, step: int) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
    return [row for row in rows if row[0].isdigit() and int(row[0]) <= step]
