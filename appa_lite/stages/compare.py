"""``compare``: families of forecast models at one budget, on a system whose law is known, in one table and one page."""

import json
import time

from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic
from appa_lite.simulators.base import Simulator
from appa_lite.stages.assimilation_twins import AssimilationTwins
from appa_lite.stages.comparison import Comparison
from appa_lite.stages.matrix import Matrix
from appa_lite.verification.comparison import score_trials, summary
from appa_lite.verification.comparison_page import comparison_page
from appa_lite.verification.tables import dumps
from appa_lite.verification.verify import Verification

FREE = ("budget", "processes", "verification", "scored", "variables", "reference")  # what may change when a comparison goes on
FREE += ("methods", "tuning", "climatology")


def run(cfg: DictConfig) -> None:
    """Data, a learning rate for each family, trainings, forecasts, scores; all of it in ``cfg.out``, resumable."""
    if cfg.methods:
        return _assimilation(cfg)
    began = time.monotonic()
    comparison = Comparison(cfg, build(cfg.simulator, Simulator))
    verification = build(cfg.verification, Verification)
    settings = _claim(cfg, comparison)
    with Matrix(comparison.out / "jobs", cfg.processes) as matrix:
        matrix.run(comparison.simulations(), "data")
        comparison.twins()
        rates = _rates(comparison, matrix, settings)
        jobs = comparison.trainings(rates, settings["seconds_train"])
        timing = matrix.run(jobs, f"{len(jobs)} trainings of {settings['seconds_train']:.0f} s")
        timing |= matrix.run(comparison.together(), "ensembles")
    trials = comparison.trials(rates, timing, settings["seconds_train"])
    records = score_trials(verification, *comparison.systems(trials), trials, comparison.reference, comparison.variables, cfg.seed)
    out = comparison.out
    told = OmegaConf.to_container(cfg) | {"reference": comparison.reference}
    page = comparison_page(records, trials, told, (out / "commands.txt").read_text().splitlines())
    for name, text in (("scores.json", dumps(records, ".json")), ("report.html", page)):
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
    table = comparison.search_scores()
    with atomic(comparison.out / "learning_rates.json") as partial:
        partial.write_text(dumps(table, ".json"))
    best = {}
    for family in comparison.families:
        rows = [r for r in table if r["family"] == family]
        best[family] = min(rows, key=lambda r: r["crps_fair"])["learning_rate"]
        print(f"{family}: learning rate {best[family]:g} of " + ", ".join(f"{r['learning_rate']:g} ({r['crps_fair']:.4g})" for r in rows))
    return best
