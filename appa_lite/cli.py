"""One door: ``appa-lite COMMAND key=value ...``. Nothing heavy is imported before a command runs."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from appa_lite import __version__
from appa_lite.core.errors import UserError

COMMANDS = {
    "quickstart": ("everything at once on the shipped ocean, from a truth to a report", "out=runs/quickstart"),
    "simulate": ("run a simulator: trajectories to train on and truths to test with", "experiment=lorenz96 out=runs/truth.zarr"),
    "observe": ("draw an honest, noisy observation file from a truth", "experiment=lorenz96 truth=runs/truth.zarr out=runs/obs.parquet"),
    "calibrate": (
        "learn station biases and representativeness errors from a gridded truth",
        "observations=stations.csv truth=analysis.nc period=[2017-01-01,2017-01-21] out=runs/stations.parquet",
    ),
    "estimate": (
        "estimate the errors and biases of observations from innovations, without a truth",
        "checkpoint=checkpoints/lorenz96 observations=runs/obs.parquet out=runs/obs_estimated.parquet",
    ),
    "train": (
        "train an autoencoder, a denoiser on its latents, or a forecast model",
        "experiment=lorenz96 trainable=autoencoder data=runs/train.zarr run=runs/autoencoder",
    ),
    "reanalysis": (
        "posterior ensemble over a period, from all its observations",
        "checkpoint=checkpoints/lorenz96 observations=runs/obs.parquet out=runs/reanalysis.zarr",
    ),
    "filter": (
        "analyses in time order, each from the observations up to its time; goes on from a previous run",
        "checkpoint=checkpoints/lorenz96 observations=runs/obs.parquet out=runs/analyses.zarr",
    ),
    "tune": (
        "the settings of an assimilation method with the smallest error on validation data",
        "experiment=lorenz96 forecaster=letkf truth=runs/validation.zarr observations=runs/obs.parquet grid={radius:[12,20]}",
    ),
    "plan": (
        "memory, time, traffic and cost of a training, before any of it is paid",
        "experiment=ocean size=base launch=zero2 processes=8 device=a100 out=plan.json",
    ),
    "forecast": (
        "forecast ensemble from an analysis or one state",
        "checkpoint=checkpoints/lorenz96 initial=runs/reanalysis.zarr out=runs/forecast.zarr lead=5d",
    ),
    "compare": (
        "families of forecast models at one budget, beside an oracle that samples the law itself",
        "experiment=lorenz96_compare budget=20m out=runs/compare",
    ),
    "verify": (
        "score a forecast or analysis against a truth or observations",
        "forecast=runs/forecast.zarr truth=runs/truth.zarr out=runs/scores.json",
    ),
    "tails": (
        "heavy-tailed priors side by side on data whose tail is known",
        "experiment=advected_rain budget=2m out=runs/tails",
    ),
    "benchmark": (
        "guidance methods beside a posterior that is known: error against cost",
        "experiment=gaussian_process sampler.steps=16 out=runs/benchmark",
    ),
    "extremes": (
        "how likely a rare event is, with its error, and an ensemble of what it looks like",
        "experiment=gaussian_process event='area_mean(u, box(10, 21, 10, 21)) > 2' out=runs/extremes.zarr",
    ),
    "report": ("one self-contained HTML page of a run directory", "run=runs/quickstart out=runs/report.html"),
}
HELP = """usage: appa-lite COMMAND key=value ...

Reanalysis and ensemble forecasts from sparse observations, with one latent video diffusion prior.

commands:
{commands}

  appa-lite COMMAND --help          every key, its default and meaning
  appa-lite COMMAND --show-config   the configuration that would run
  appa-lite --version

APPA_LITE_DEBUG=1 shows tracebacks.
"""
DISK = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for a user's mistake, 130 for an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("appa-lite: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, FloatingPointError) as error:
        message = _message(error)
        if message is None or os.environ.get("APPA_LITE_DEBUG"):
            raise
        print(f"appa-lite: error: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _message(error: UserError | OSError | FloatingPointError) -> str | None:
    """The line for a mistake of the user's or of the disk's, or numbers that blew up; None for an error of ours."""
    if isinstance(error, UserError | FloatingPointError):
        return str(error)
    where = error.filename or "writing failed"
    if error.errno in DISK or "No space left" in str(error):
        return f"{where}: no space left on the device: free some, or write elsewhere"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"{where}: permission denied: check the permissions, or write elsewhere"
    return None


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:12}{meaning}" for name, (meaning, _) in COMMANDS.items())))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"appa-lite {__version__}")
        return 0
    from appa_lite import config

    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise config.unknown("command", command, COMMANDS)
    if {"-h", "--help"} & set(rest):
        print(_help(command))
        return 0
    show = "--show-config" in rest
    cfg = config.compose(command, [argument for argument in rest if argument != "--show-config"], partial=show)
    if show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    importlib.import_module(f"appa_lite.stages.{command}").run(cfg)
    return 0


def _help(command: str) -> str:
    from appa_lite import config

    meaning, example = COMMANDS[command]
    rows = config.describe(command)
    lines = [f"usage: appa-lite {command} key=value ...", "", f"{meaning[0].upper()}{meaning[1:]}.", "", "keys (default; ??? is required):"]
    width = max(len(f"{key}={default}") for key, default, _ in rows) + 2
    lines += [f"  {f'{key}={default}':{width}}{text}".rstrip() for key, default, text in rows]
    groups = [key for key, _, _ in rows if key in config.GROUPS]
    lines += ["", "options:"] * bool(groups) + [f"  {group + '=':14}{' | '.join(config.options(group)) or '(none)'}" for group in groups]
    if "experiment" in groups:
        lines.append(f"  {'experiment=':14}FILE.yaml, an experiment of your own")
    return "\n".join([*lines, "", "example:", f"  appa-lite {command} {example}"])
