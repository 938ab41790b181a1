#!/usr/bin/env bash
# The tables of docs/planning.md: launch/scaling.sh OUT [sizes | fit | processes | all]
#   sizes      time of a training step from debug to base, beside what `plan` says of it
#   fit        time of a step against cells and frames, and a law fitted to it
#   processes  a reanalysis on one process, on two, and as two that do not know of each other, in turns, one thread each
set -euo pipefail
out=${1:?usage: launch/scaling.sh OUT [sizes|fit|processes|all] [REPETITIONS]} what=${2:-all} repetitions=${3:-3}
here=$(cd "$(dirname "$0")/.." && pwd)
export OMP_NUM_THREADS=1
mkdir -p "$out"

plan() { appa-lite plan device=cpu calibrate=true "$@" >/dev/null; }

if [[ $what == sizes || $what == all ]]; then
  for chosen in "lorenz96 debug" "lorenz96 small" "lorenz96 base" "ocean debug" "ocean small"; do  # ocean base is for a GPU
    read -r experiment size <<<"$chosen"
    plan experiment="$experiment" size="$size" 'training={batch: 1, precision: fp32}' out="$out/${experiment}_$size.json"
  done
fi

if [[ $what == fit || $what == all ]]; then
  for rows in 32 64 128; do
    for window in 6 12; do
      grid="{channels: 4, rows: $rows, columns: 64, step: 3600, periodic: [false, true], frames: 1000}"
      plan experiment=ocean simulator=null grid="$grid" window="$window" 'training={batch: 1, precision: fp32}' \
        out="$out/fit_${rows}_$window.json"
    done
  done
fi

if [[ $what == processes || $what == all ]]; then
  appa-lite simulate experiment=lorenz96 trajectories=1 frames=40 out="$out/truth.zarr"
  appa-lite observe experiment=lorenz96 truth="$out/truth.zarr" out="$out/observations.parquet"
  work=(reanalysis experiment=lorenz96 checkpoint="$here/checkpoints/lorenz96" observations="$out/observations.parquet"
    batch=2 device=cpu)
  one() { python -m appa_lite "${work[@]}" members="$1" out="$out/one${2-}.zarr" >/dev/null 2>&1; }
  two() { accelerate launch --config_file "$here/launch/accelerate/cpu2.yaml" -m appa_lite "${work[@]}" members="$1" \
    out="$out/two.zarr" >/dev/null 2>&1; }
  apart() { one $(($1 / 2)) a & one $(($1 / 2)) b && wait $!; } # what the machine gives to two processes
  : >"$out/seconds.txt"
  TIMEFORMAT='%R %U %S'
  for ((i = 0; i < repetitions; i++)); do
    for members in 4 16; do # the difference is free of what it takes to start
      for way in one two apart; do
        { time "$way" "$members"; } 2>"$out/time.txt"
        echo "$way $members $(cat "$out/time.txt")" >>"$out/seconds.txt"
      done
    done
  done
fi

python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np

out = Path(sys.argv[1])


def values(path):
    return {row["quantity"]: row["value"] for row in json.loads(path.read_text())}


print("experiment and size | model | parameters | FLOP a sample | s a step here | share of the peak")
for path in sorted([*out.glob("lorenz96_*.json"), *out.glob("ocean_*.json")]):
    row = values(path)
    for model in ("autoencoder", "denoiser"):
        if f"{model}.flops" in row:
            numbers = (row[f"{model}.{key}"] for key in ("parameters", "flops", "seconds_per_step", "mfu"))
            print(path.stem, model, *(f"{number:.3g}" for number in numbers), sep=" | ")

found = [(path.stem.split("_")[1:], values(path)) for path in sorted(out.glob("fit_*.json"))]
for model in ("autoencoder", "denoiser") if found else ():
    work = np.array([row[f"{model}.flops"] for _, row in found])
    seconds = np.array([row[f"{model}.seconds_per_step"] for _, row in found])
    matrix = np.stack([np.ones_like(work), work], axis=1) / seconds[:, None]  # relative errors count
    (fixed, each), *_ = np.linalg.lstsq(matrix, np.ones_like(work), rcond=None)
    error = np.abs(matrix @ [fixed, each] - 1).max()
    for (rows, window), row in found:
        print(model, rows, window, *(f"{row[f'{model}.{key}']:.3g}" for key in ("flops", "seconds_per_step")), sep=" | ")
    print(f"{model}: seconds = {fixed:.3g} + FLOP / {1 / each:.3g}, within {100 * error:.0f} %")

if (out / "seconds.txt").exists():
    lines = [line.split() for line in (out / "seconds.txt").read_text().splitlines()]
    seconds = {}  # by way and members, one row a repetition: by the clock, of the processors
    for way, members, clock, user, system in lines:
        seconds.setdefault((way, int(members)), []).append((float(clock), float(user) + float(system)))
    seconds = {key: np.array(rows) for key, rows in seconds.items()}
    more = {way: seconds[way, 16] - seconds[way, 4] for way in ("one", "two", "apart")}  # 12 members more
    for way, rows in more.items():
        print(f"12 members more, {way}:", *(f"{clock:.1f} ({busy:.1f})" for clock, busy in rows), "seconds by the clock (of the processors)")
    told = {
        "by the clock": more["one"][:, 0] / (2 * more["two"][:, 0]),
        "of the processors": more["one"][:, 1] / more["two"][:, 1],
        "by the clock, of two that know nothing of each other": more["one"][:, 0] / (2 * more["apart"][:, 0]),
        "of sharing: two apart over two together": more["apart"][:, 0] / more["two"][:, 0],
        "by the clock, 16 members with the start": seconds["one", 16][:, 0] / (2 * seconds["two", 16][:, 0]),
    }
    for what, values in told.items():
        print(f"efficiency {what}: median {np.median(values):.2f} of", *(f"{value:.2f}" for value in values))
PYTHON
