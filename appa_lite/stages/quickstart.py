"""``quickstart``: the main job from end to end on an ocean never seen, each step a command that can be typed by itself."""

import os
import shlex
import time
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from appa_lite import config
from appa_lite.core.errors import UserError
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.stages import forecast, observe, reanalysis, report, simulate, verify
from appa_lite.stages.prior import duration

STAGES = {s.__name__.rsplit(".", 1)[1]: s for s in (simulate, observe, reanalysis, forecast, verify, report)}
START = np.datetime64("2030-01-01")


def run(cfg: DictConfig) -> None:
    """Simulate a truth, observe it, reanalyse, forecast, verify and report, in ``cfg.out``."""
    checkpoint = Path(cfg.checkpoint) if cfg.checkpoint else config.directory().parent / "checkpoints" / str(cfg.experiment)
    if not checkpoint.is_dir():
        raise UserError(f"no model at '{checkpoint}': give checkpoint=DIR, or run in a checkout of the repository, which ships one")
    checkpoint = Path(os.path.relpath(checkpoint)) if checkpoint.is_absolute() and checkpoint.is_relative_to(Path.cwd()) else checkpoint
    out, began = Path(cfg.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    typed = []
    for line in lines(cfg, checkpoint, out):
        print(f"\n$ appa-lite {shlex.join(line)}", flush=True)
        typed.append(f"appa-lite {shlex.join(line)}")
        (out / "commands.txt").write_text("\n".join(typed) + "\n")
        STAGES[line[0]].run(config.compose(line[0], line[1:]))
    print(f"\n{out / 'report.html'}: open it in a browser. All of it took {(time.monotonic() - began) / 60:.1f} minutes.")


def lines(cfg: DictConfig, checkpoint: Path, out: Path) -> list[list[str]]:
    """The commands, as they could be typed."""
    model = Checkpoint.load(checkpoint)
    step = model.spec.step
    phase = model.settings.get("phase", 0.0)
    begin = phase + np.ceil((START.astype("datetime64[s]").astype(float) - phase) / step) * step
    observed = round(cfg.days * 86400 / step)
    ahead = round(duration(cfg.lead, "lead") / step)
    if observed < 2:
        raise UserError(f"days={cfg.days} is shorter than two frames of this model, {2 * step / 86400:g} days")
    date = lambda frame: str(np.datetime64(int(begin + frame * step), "s"))  # noqa: E731
    experiment, seed = f"experiment={cfg.experiment}", f"seed={cfg.seed}"
    files = {name: str(out / name) for name in ("truth.zarr", "observations.parquet", "withheld.parquet")}
    files |= {name: str(out / f"{name}.zarr") for name in ("reanalysis", "optimal_interpolation", "forecast")}
    states = checkpoint / "states.safetensors"
    start = [f"states={states}", "spinup=50"] if states.is_file() else []
    truth = ["simulate", experiment, f"out={files['truth.zarr']}", "trajectories=1", f"start={date(0)}", *start]
    truth += [f"frames={observed + ahead + 1}", f"seed={cfg.seed + 100}"]
    observing = ["observe", experiment, f"truth={files['truth.zarr']}", f"end={date(observed)}"]
    common = [f"checkpoint={checkpoint}", f"device={cfg.device}", seed, f"size={cfg.size}"]
    analysis = ["reanalysis", experiment, *common, f"observations={files['observations.parquet']}", f"members={cfg.members}"]
    analysis += [f"start={date(0)}", f"end={date(observed)}"]
    compare = f"baselines={{optimal_interpolation: {files['optimal_interpolation']}}}"
    scores = ["verify", f"checkpoint={checkpoint}", seed]
    scored = [*scores, f"forecast={files['reanalysis']}", compare]
    title = "title=A turbulent ocean from sparse observations"
    return [
        truth,
        [*observing, f"out={files['observations.parquet']}", seed],
        [*observing, f"out={files['withheld.parquet']}", f"seed={cfg.seed + 1}", "network=withheld"],
        [*analysis, f"out={files['reanalysis']}"],
        [*analysis, f"out={files['optimal_interpolation']}", "forecaster=optimal_interpolation"],
        ["forecast", experiment, *common, f"initial={files['reanalysis']}", f"out={files['forecast']}", f"lead={cfg.lead}"],
        [*scored, f"truth={files['truth.zarr']}", f"out={out / 'scores_reanalysis.json'}"],
        [*scored, f"observations={files['withheld.parquet']}", f"out={out / 'scores_withheld.json'}"],
        [*scores, f"forecast={files['forecast']}", f"truth={files['truth.zarr']}", f"out={out / 'scores_forecast.json'}"],
        ["report", experiment, f"run={out}", f"out={out / 'report.html'}", f"picture={out / 'picture.png'}", title],
    ]
