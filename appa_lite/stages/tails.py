"""``tails``: heavy-tailed priors side by side, on the same data and budget, beside the law they learn."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.random import derive
from appa_lite.core.store import atomic, provenance
from appa_lite.forecasters.tail_laboratory import Record, Summary, draw_fields, snapshots, tail_scores
from appa_lite.simulators.base import Simulator
from appa_lite.stages.heavy_tails import PRIORS, Fitted, fit_prior
from appa_lite.verification.tail_figures import COLUMNS, tail_figure, tail_table


def run(cfg: DictConfig) -> None:
    """Train every prior of ``cfg.priors`` with every seed, generate, compare; write the table and the figure to ``cfg.out``."""
    unknown = [name for name in cfg.priors if name not in PRIORS]
    if unknown or not cfg.priors:
        raise UserError(f"priors={list(cfg.priors)}: expected some of {', '.join(PRIORS)}")
    if set(cfg.bounds) - set(COLUMNS):
        raise UserError(f"bounds={dict(cfg.bounds)}: expected distances of some of {', '.join(COLUMNS)}")
    if min(cfg.seeds, cfg.spacing) < 1 or min(cfg.snapshots, cfg.generated) < 20:
        raise UserError(f"seeds={cfg.seeds}, spacing={cfg.spacing}, snapshots={cfg.snapshots}, generated={cfg.generated}: too few")
    out, simulator = Path(cfg.out), build(cfg.simulator, Simulator)
    if out.is_file():
        raise UserError(f"out={out} is a file: give a directory")
    quantile = getattr(simulator, "quantile", None)
    truth = _kept(out / "truth", cfg, lambda: snapshots(simulator, derive(cfg.seed, "truth"), cfg.generated), {})[0]
    records, samples = [], {"truth": truth.pixels}
    for number in range(cfg.seeds):
        data = None
        for name in ("training data", *cfg.priors):
            place, facts = out / name.replace(" ", "_") / f"seed_{number}", {}
            if data is None and not (place / "record.json").is_file():
                data = snapshots(simulator, derive(cfg.seed, "data", number), cfg.snapshots)

            def make(data=data, name=name, place=place, number=number, facts=facts) -> torch.Tensor:
                return data if name == "training data" else _generate(cfg, simulator, data, name, number, place, facts)

            summary, known = _kept(place, cfg, make, facts)
            rows = tail_scores(summary, truth, quantile)
            records += [{"prior": name, "seed": number, **row, **known} for row in rows]
            samples.setdefault(name, summary.pixels)
    records = [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in r.items()} for r in records]
    what = cfg.experiment or cfg.simulator["class"].rsplit(".", 1)[-1]
    title = f"{what}: {cfg.snapshots} snapshots, {cfg.seeds} seed{'s' * (cfg.seeds > 1)}"
    table = tail_table(records, dict(cfg.bounds))
    files = {
        "tails.json": json.dumps(records, indent=0).encode(),
        "tails.csv": _csv(records),
        "tails.png": tail_figure(samples, records, quantile, title),
    }
    files["settings.json"] = json.dumps(provenance(cfg, cfg.seed), indent=1).encode()
    for name, content in files.items():
        with atomic(out / name) as partial:
            partial.write_bytes(content)
    print(f"{title}\n{table}\n{out / 'tails.json'}: {len(records)} rows; {out / 'tails.png'}: the tails")


def _csv(records: list[Record]) -> bytes:
    lines = [",".join(records[0]), *(",".join("" if v is None else str(v) for v in r.values()) for r in records)]
    return "\n".join([*lines, ""]).encode()


def _kept(place: Path, cfg: DictConfig, make: Callable[[], torch.Tensor], facts: dict) -> tuple[Summary, dict]:
    """The summary of the fields that ``make`` makes and ``facts`` about them, which are read where they were made before."""
    if (place / "record.json").is_file():
        stored = load_file(place / "summary.safetensors")
        return Summary(**stored), json.loads((place / "record.json").read_text())
    summary = Summary.of(make()[:, 0], cfg.spacing)
    place.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in vars(summary).items()}, place / "summary.safetensors")
    facts = {"seconds_train": facts.get("seconds_train"), "network_calls": facts.get("network_calls")}
    with atomic(place / "record.json") as partial:
        partial.write_text(json.dumps(facts))
    return summary, facts


def _generate(cfg: DictConfig, simulator: Simulator, data: torch.Tensor, name: str, number: int, place: Path, facts: dict) -> torch.Tensor:
    """Train a prior and draw from it."""
    began = time.monotonic()
    prior: Fitted = fit_prior(cfg, simulator.spec, data, name, derive(cfg.seed, "training", number) % 2**31, place)
    facts |= {"seconds_train": round(time.monotonic() - began, 1), "network_calls": prior.calls(prior.sampler(cfg))}
    sampler = prior.sampler(cfg)
    with tqdm(total=cfg.generated, desc=f"{name}, seed {number}", unit="field", leave=False) as bar:
        seed = derive(cfg.seed, "generated", number) % 2**31
        return draw_fields(
            prior.checkpoint, prior.denoiser, prior.law, sampler, prior.proxy, cfg.generated, seed, progress=lambda n: bar.update(n - bar.n)
        )
