"""``benchmark``: guidance methods and samplers beside a posterior that is known, error against cost; or their price on a learned prior."""

import json
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from appa_lite.config import build, compose, directory, options
from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic, provenance
from appa_lite.diffusion.base import Sampler
from appa_lite.forecasters.guided_cost import guided_cost
from appa_lite.forecasters.laboratory import Problem, guided_sample, make_problem, scores
from appa_lite.guidance.base import Guidance
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations import build_observation
from appa_lite.simulators.base import Simulator
from appa_lite.stages import assimilation as shared
from appa_lite.stages.device import device
from appa_lite.verification.cost import COST, SCORES, cost_figure, cost_table, over_problems
from appa_lite.verification.tables import Record, dumps

SETTINGS = ("design", "frames", "rows", "fraction", "error", "error_max", "rank", "draws")


def run(cfg: DictConfig) -> None:
    """Draw from every posterior with every method; write ``benchmark.json`` and ``.png`` in ``cfg.out``; print the means."""
    if cfg.members < 2 or min(cfg.batch, cfg.problems) < 1:
        raise UserError(f"members are at least 2, batch and problems 1, found {cfg.members}, {cfg.batch} and {cfg.problems}")
    out = Path(cfg.out)
    if out.is_file():
        raise UserError(f"out={out} is a file: give a directory")
    if cfg.checkpoint is not None:
        return price(cfg, out)
    simulator = build(cfg.simulator, Simulator)
    lines, records = list(methods(cfg)), []
    for number in range(cfg.problems):
        problem = make_problem(simulator, **{key: cfg[key] for key in SETTINGS}, seed=cfg.seed + number)
        records += [{**labels, "problem": number, **measure(problem, *method, cfg, labels)} for labels, method in lines]
    rows, title = over_problems(records), _title(cfg, len(problem.matrix))
    files = {"benchmark.json": dumps(records, ".json").encode(), "benchmark.png": cost_figure(rows, title)}
    files["settings.json"] = json.dumps(provenance(cfg, cfg.seed), indent=1).encode()
    _write(out, files)
    print(f"{title}\n{cost_table(rows)}\n{out / 'benchmark.json'}: {len(records)} rows; {out / 'benchmark.png'}: error against cost")


def price(cfg: DictConfig, out: Path) -> None:
    """What guided calls cost on a learned prior and a file of observations: ``cost.json`` in ``out``, and a table."""
    if cfg.observations is None:
        raise UserError("benchmark checkpoint=... needs observations=FILE, whose guided calls are timed")
    model, paths, options = Checkpoint.load(cfg.checkpoint, device(cfg.device)), shared.files(cfg.observations), shared.table_options(cfg)
    if model.denoiser is None:
        raise UserError(f"'{cfg.checkpoint}' holds an autoencoder only: give the model directory of a denoiser")
    table = shared.canonical_table(shared.read_files(paths, options), cfg)
    times = shared.covering(*shared.ends(table["time"], cfg.start, cfg.end), model.spec.step, model.settings.get("phase", 0.0))
    observation, _ = build_observation(table, model.spec, times, options)
    observation, records = observation.to(device(cfg.device), torch.float32), []
    for labels, (guidance, sampler) in methods(cfg):
        if guidance is None:
            raise UserError("guidance=null has no guided call to time")
        with tqdm(desc=" ".join(map(str, labels.values())), unit="step", leave=False) as bar:
            step = partial(_advance, bar)
            found = guided_cost(model, observation, times, guidance, sampler, range(cfg.members), cfg.seed, step)
        records.append({**labels, "members": cfg.members, "observations": len(observation), "frames": len(times), **found})
    files = {"cost.json": dumps(records, ".json"), "settings.json": json.dumps(provenance(cfg, cfg.seed, paths), indent=1)}
    _write(out, {name: content.encode() for name, content in files.items()})
    frame = pd.DataFrame(records).drop(columns=["members", "observations", "frames"])
    print(f"{len(observation)} observations of {len(times)} frames, {cfg.members} members at once; multiples of a plain forward")
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.3g}"))


def _advance(bar: tqdm, step: int, steps: int) -> None:
    bar.update()


def _write(out: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with atomic(out / name) as unfinished:
            unfinished.write_bytes(content)


def methods(cfg: DictConfig) -> Iterator[tuple[Record, tuple[Guidance | None, Sampler]]]:
    """Labels (guidance, sampler, steps) and objects of each line of the table."""
    common, given = tuple(f"{key}={cfg[key]}" for key in ("experiment", "size") if cfg[key]), OmegaConf.to_container(cfg)
    for line in cfg.methods or [""]:
        words, chosen = str(line).split(), {}
        odd = [word for word in words if word.split("=")[0].split(".")[0] not in ("guidance", "sampler")]
        if odd:
            raise UserError(f"methods: '{odd[0]}' changes neither guidance nor sampler: expected such as 'guidance=dps sampler.steps=64'")
        for key in ("guidance", "sampler"):
            if any(word.startswith(f"{key}=") for word in words):
                chosen[key] = OmegaConf.to_container(compose("benchmark", [*common, *words], partial=True))[key]
            else:  # as typed for the whole command, with the changes of this line
                changes = [word.removeprefix(f"{key}.") for word in words if word.startswith(f"{key}.")]
                chosen[key] = given[key] and OmegaConf.to_container(OmegaConf.merge(given[key], OmegaConf.from_dotlist(changes)))
        names = {key: _name(key, section, common) for key, section in chosen.items()}
        guidance = None if chosen["guidance"] is None else build(chosen["guidance"], Guidance)
        for steps in cfg.steps or [chosen["sampler"].get("steps")]:
            sampler = chosen["sampler"] | ({} if steps is None else {"steps": steps})
            yield {**names, "steps": steps}, (guidance, build(sampler, Sampler))


def _name(group: str, section: dict[str, Any] | None, common: tuple[str, ...]) -> str:
    """The option of a group that a section comes from, and what differs from it: 'ode_2m sigma_max=50'."""
    if section is None:
        return "exact"
    found = []
    for option in options(group):
        if OmegaConf.load(directory() / group / f"{option}.yaml")["class"] == section["class"]:
            changed = [f"{k}={v}" for k, v in section.items() if _shipped(group, option, common).get(k) != v and k != "steps"]
            found.append((len(changed), " ".join([option, *changed])))
    return min(found, default=(0, section["class"].rsplit(".", 1)[-1]))[1]


@cache
def _shipped(group: str, option: str, common: tuple[str, ...]) -> dict[str, Any]:
    """An option as the experiment has it."""
    return OmegaConf.to_container(compose("benchmark", [*common, f"{group}={option}"], partial=True))[group]


def _title(cfg: DictConfig, rows: int) -> str:
    what = f"{cfg.experiment or cfg.simulator['class'].rsplit('.', 1)[-1]}, {rows} observations ({cfg.design})"
    error = "random error" if cfg.error is None else f"error {cfg.error:g}" + (f" to {cfg.error_max:g}" if cfg.error_max else "")
    return f"{what}, {error}, {cfg.members} members" + (f", {cfg.problems} problems" if cfg.problems > 1 else "")


def measure(problem: Problem, guidance: Guidance | None, sampler: Sampler, cfg: DictConfig, labels: Record) -> Record:
    """The scores and the cost of one method; no scores where it diverged."""
    record = dict.fromkeys((*SCORES, "mode_weight_error", *COST)) | {"members": cfg.members, "observations": len(problem.matrix)}
    began = time.monotonic()
    try:
        with tqdm(desc=" ".join(map(str, labels.values())), unit="step", leave=False) as bar:
            x, calls, report = guided_sample(problem, guidance, sampler, cfg.members, cfg.batch, cfg.seed, lambda *_: bar.update())
        record["seconds"] = round(time.monotonic() - began, 2)
        found = scores(problem, x, cfg.seed)
    except FloatingPointError as error:
        return record | {"remark": f"diverged: {error}"}
    solver = report.summary()
    found |= {"solver_iterations": solver["solver_iterations_mean"], "solver_residual": solver["solver_residual_max"]}
    return record | found | {"forwards": calls.forwards / cfg.members, "vjps": calls.vjps / cfg.members, "remark": None}
