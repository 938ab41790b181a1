"""A comparison of families of forecast models, each trained several times: one table of scores and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import xarray as xr

from appa_lite.verification.base import Sums
from appa_lite.verification.compare_scores import compare_systems, over_seeds
from appa_lite.verification.grid import standardise
from appa_lite.verification.metrics import FairCRPS
from appa_lite.verification.pairs import TruthPairs
from appa_lite.verification.tables import Record, duration, format_number
from appa_lite.verification.thresholds import climatological_quantiles
from appa_lite.verification.verify import Verification

ORACLE, CLIMATOLOGY, PERSISTENCE = "oracle", "climatology", "persistence"
BASELINES = (ORACLE, PERSISTENCE, CLIMATOLOGY)
BY_SEED = ("rmse", "crps_fair", "spread_skill")  #: scores that the table holds for every training too


@dataclass(frozen=True)
class Trial:
    """One training of a family, and what it cost. ``network_calls``: evaluations of the network for a member's whole forecast."""

    family: str
    seed: int
    name: str
    learning_rate: float
    steps_train: int
    seconds_train: float
    seconds_per_member: float
    network_calls: float
    parameters: int

    def costs(self) -> dict[str, float]:
        return {k: v for k, v in asdict(self).items() if k not in ("family", "name", "seed")}


def mean_costs(trials: Sequence[Trial]) -> dict[str, float]:
    """Of the trainings of a family."""
    every = [t.costs() for t in trials]
    return {k: float(np.mean([c[k] for c in every])) for k in every[0]}


def mean_crps(forecast: xr.Dataset, truth: xr.Dataset) -> float:
    """The fair CRPS in standard deviations of the truth, a mean over variables and lead times after zero."""
    forecast = standardise(forecast)
    after = forecast["prediction_timedelta"].values > np.timedelta64(0)
    against = TruthPairs({"forecast": forecast.isel(prediction_timedelta=after)}, truth, 0, None)
    metric, found = FairCRPS(), []
    for variable in against.variables(None):
        parts = [metric.statistics[0].compute(*pair) for pair in against.pairs("forecast", variable)]
        found.append(float(metric.value({"crps": Sums.concat(parts).mean().values})) / float(truth[variable].std()))
    return float(np.mean(found))


def climatological_ensemble(training: xr.Dataset, like: xr.Dataset, seed: int) -> xr.Dataset:
    """States drawn from training trajectories, other ones for every start, the same at all leads; dimensions as ``like``."""
    states = training.stack(state=("trajectory", "time")) if "trajectory" in training.dims else training.rename(time="state")
    starts, members = like.sizes["time"], like.sizes["number"]
    chosen = np.random.default_rng([seed, 7]).integers(states.sizes["state"], size=(starts, members))
    drawn = states.isel(state=xr.DataArray(chosen, dims=("time", "number"))).drop_vars(["state", "trajectory", "time"], errors="ignore")
    leads = like["prediction_timedelta"]
    return drawn.assign_coords(time=like["time"], number=like["number"]).expand_dims(prediction_timedelta=leads)


def score_trials(
    verification: Verification,
    forecasts: Mapping[str, xr.Dataset],
    truth: xr.Dataset,
    training: xr.Dataset,
    trials: Sequence[Trial],
    reference: str,
    variables: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[list[Record], dict]:
    """The tidy table of a comparison: means over the trainings of each family (``seed`` null), and main scores of every one; and
    what figures need, of the first training (``Details``).

    Every system is scored on the same starts, resampled alike (see ``compare_scores``); the trainings are put together by
    ``over_seeds``, whose intervals are of starts and seeds. Thresholds of extremes are quantiles of ``training``.

    Args:
        forecasts: by ``Trial.name``, and the oracle's; with a lead of zero, for persistence.
        truth: (time, grid); training: (trajectory, time, grid).
        trials: what was trained; an ensemble of models counts for every seed.
        reference: the family that the others are compared with in pairs; variables: names to score, None: all.
    """
    seeds = sorted({t.seed for t in trials})
    thresholds = climatological_quantiles(training, verification.quantiles, verification.views)
    oracle = forecasts[ORACLE]
    common = {ORACLE: oracle, CLIMATOLOGY: climatological_ensemble(training, oracle, seed)}
    if "prediction_timedelta" in truth.dims:  # initial states are not known exactly: nor to persistence
        common |= {PERSISTENCE: oracle.isel(prediction_timedelta=[0] * oracle.sizes["prediction_timedelta"]).assign_coords(oracle.coords)}
    tables, details = {}, {}
    for number in seeds:
        mine = {f: next((t for t in trials if (t.family, t.seed) == (f, number)), None) for f in dict.fromkeys(t.family for t in trials)}
        mine = {f: t or next(t for t in trials if t.family == f) for f, t in mine.items()}
        systems = {f: forecasts[t.name] for f, t in mine.items()} | common
        scores = compare_systems(systems, truth, thresholds, reference=reference, scorer=verification, variables=variables, seed=seed)
        tables[number], details = scores.records, details or scores.details
    costs = {f: mean_costs([t for t in trials if t.family == f]) for f in dict.fromkeys(t.family for t in trials)}
    blank = dict.fromkeys(next(iter(costs.values())))
    records = [{"seed": None} | r | costs.get(str(r["system"]), blank) for r in over_seeds(tables, verification.confidence)]
    for trial in trials:
        rows = [r for r in tables[trial.seed] if r["system"] == trial.family and r["metric"] in BY_SEED]
        records += [{"seed": trial.seed} | r | {"seeds": 1, "seed_std": None} | trial.costs() for r in rows]
    return records, details


def complete(rows: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """Rows of one training in the columns of the table's records, their costs those of the family."""
    like = {r["system"]: r for r in reversed(records) if r["seed"] is None}
    return [like[r["system"]] | r | {"seeds": 1, "seed_std": None} for r in rows]


def lookup(records: Sequence[Record]) -> dict[tuple, Record]:
    """Records of families and baselines by (variable, lead time, system, metric)."""
    return {(r["variable"], r["lead_time"], r["system"], r["metric"]): r for r in records if r["seed"] is None}


def spread_out(leads: Sequence[float], most: int) -> list[float]:
    """At most so many of the sorted leads, the first and the last among them."""
    return list(leads) if len(leads) <= most else [leads[round(k * (len(leads) - 1) / (most - 1))] for k in range(most)]


def summary(records: Sequence[Record], trials: Sequence[Trial]) -> str:
    """A table to read: CRPS as a part of the way from climatology to the oracle, spread over skill, and what it costs."""
    table, families = lookup(records), list(dict.fromkeys(t.family for t in trials))
    variable = str(records[0]["variable"])
    chosen = spread_out(sorted({r["lead_time"] for r in records if r["lead_time"]}), 4)
    ends = (chosen[0], chosen[-1])
    head = [variable, *(f"CRPS skill {duration(v)}" for v in chosen), *(f"spread/skill {duration(v)}" for v in ends)]
    rows = [[*head, "calls", "s/member", "parameters"]]
    for system in families:
        costs = mean_costs([t for t in trials if t.family == system])
        skills = [table.get((variable, v, system, "crps_fair_skill_score")) for v in chosen]
        spreads = [table.get((variable, v, system, "spread_skill")) for v in ends]
        cells = ["-" if r is None else format_number(r["value"]) for r in (*skills, *spreads)]
        rows.append(
            [
                system,
                *cells,
                format_number(costs["network_calls"]),
                format_number(costs["seconds_per_member"]),
                f"{costs['parameters']:.0f}",
            ]
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows)
