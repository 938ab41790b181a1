"""``compare``: families of forecast models at one budget, on a system whose law is known, in one table and one page."""

import json
import shlex
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic
from appa_lite.simulators.base import Simulator
from appa_lite.stages.assimilation_twins import AssimilationTwins
from appa_lite.stages.comparison import Comparison
from appa_lite.stages.matrix import Matrix
from appa_lite.stages.parallel import rank
from appa_lite.verification.comparison import complete, score_trials, summary
from appa_lite.verification.comparison_page import comparison_page
from appa_lite.verification.free_runs import How, score_free_runs
from appa_lite.verification.tables import dumps
from appa_lite.verification.verify import Verification

FREE = ("budget", "processes", "verification", "scored", "variables", "reference")  # what may change when a comparison goes on
FREE += ("methods", "tuning", "forecasts", "climatology")


def run(cfg: DictConfig) -> None:
    """Data, a learning rate for each family, trainings, forecasts, scores; all of it in ``cfg.out``, resumable."""
    if rank() > 0:  # of several launched processes the first compares, the others compute for it
        with Matrix(Path(cfg.out) / "jobs", cfg.processes) as matrix:
            return matrix.serve()
    if cfg.methods:
        return _assimilation(cfg)
    began = time.monotonic()
    comparison = Comparison(cfg, build(cfg.simulator, Simulator))
    verification = build(cfg.verification, Verification)
    settings = _claim(cfg, comparison)
    with Matrix(comparison.out / "jobs", cfg.processes) as matrix:
        data = comparison.simulations()
        matrix.run(data, "data")
        comparison.twins()
        rates = _rates(comparison, matrix, settings)
        jobs = comparison.trainings(rates, settings["seconds_train"])
        timing = matrix.run(jobs, f"{len(jobs)} trainings of {settings['seconds_train']:.0f} s")
        besides = comparison.together(_values(comparison, matrix))
        timing |= matrix.run(besides, "ensembles and variants")
        free = comparison.free_runs()
        matrix.run(free, "free runs")
    trials = comparison.trials(rates, timing, settings["seconds_train"])
    forecasts, truth, training = comparison.systems(trials)
    records, details = score_trials(verification, forecasts, truth, training, trials, comparison.reference, comparison.variables, cfg.seed)
    how = How(tuple(cfg.free.periods), verification.replicates, verification.confidence, cfg.seed)
    rows, details["free_runs"] = score_free_runs(comparison.ran_free(), training, comparison.variables, how)
    records += complete(rows, records)
    commands = [f"appa-lite {shlex.join(line)}" for job in (*data, *jobs, *besides, *free) for line in job.commands]
    told = OmegaConf.to_container(cfg) | {"reference": comparison.reference}
    texts = {"scores.json": dumps(records, ".json"), "details.json": json.dumps(details, allow_nan=False)}
    texts |= {"commands.txt": "\n".join(commands) + "\n", "report.html": comparison_page(records, trials, told, commands, details)}
    out = comparison.out
    for name, text in texts.items():
        with atomic(out / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(summary(records, trials))
    print(f"{out / 'scores.json'}: {len(records)} scores\n{out / 'report.html'}: {(time.monotonic() - began) / 60:.1f} minutes")


def _assimilation(cfg: DictConfig) -> None:
    """The other protocol: assimilation methods on the same observations."""
    twins = AssimilationTwins(cfg, build(cfg.simulator, Simulator))
    _claim(cfg, twins)
    twins.run(build(cfg.verification, Verification))


def _claim(cfg: DictConfig, comparison: Comparison | AssimilationTwins) -> dict:
    """The settings that a comparison was begun with: trainings of one table have one length, also when it goes on later."""
    path = comparison.out / "comparison.json"
    plain = {k: v for k, v in OmegaConf.to_container(cfg).items() if k not in (*FREE, "out", "command")}
    if path.exists():
        found = json.loads(path.read_text())
        changed = [k for k in plain if plain[k] != found["configuration"].get(k, plain[k])]
        if changed:
            raise UserError(f"'{comparison.out}' holds a comparison with other settings ({', '.join(changed)}): give another out=")
        return found
    settings = {"configuration": plain, "seconds_train": comparison.seconds}
    comparison.out.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        partial.write_text(json.dumps(settings, indent=1))
    return settings


def _rates(comparison: Comparison, matrix: Matrix, settings: dict) -> dict[str, float]:
    """The learning rate of each family: that of the best forecasts of the validation period."""
    rates = list(comparison.cfg.learning_rates)
    if len(rates) == 1:
        return dict.fromkeys(comparison.families, rates[0])
    matrix.run(comparison.search(settings["seconds_train"]), "learning rates")
    return _best(comparison, comparison.search_scores(), "learning_rates.json")


def _values(comparison: Comparison, matrix: Matrix) -> dict[str, object]:
    """The value of each variant's key, chosen alike."""
    matrix.run(comparison.variant_search(), "variants")
    table = comparison.variant_scores()
    only = {name: values[0] for name, (_, _, values) in comparison.variants.items()}
    return only | (_best(comparison, table, "variants.json") if table else {})


def _best(comparison: Comparison, table: list[dict], file: str) -> dict[str, object]:
    with atomic(comparison.out / file) as partial:
        partial.write_text(dumps(table, ".json"))
    best = {}
    for name in dict.fromkeys(r["family"] for r in table):
        rows = [r for r in table if r["family"] == name]
        best[name] = min(rows, key=lambda r: r["crps_fair"])["value"]
        print(f"{name}: {rows[0]['key']} {best[name]:g} of " + ", ".join(f"{r['value']:g} ({r['crps_fair']:.4g})" for r in rows))
    return best
