#!/usr/bin/env bash
# Is rain between gauges calibrated? A learned model of rain, conditioned on independent snapshots of gauges, beside the exact
# posterior: ranks of the truth, and of the exact posterior's members, at gauges, near them and beyond.
#   bash launch/rain_gauges.sh [OUT]     OUT may hold the prior that a run before has trained
source "$(dirname "$0")/setup.sh"
work=${1:-runs/rain_gauges}
snapshots="experiment=advected_rain simulator.memory=0" # frames without memory: as many independent fields of rain

# the prior, trained on snapshots (minutes); guidance needs its error at more noise levels than tails do
appa-lite tails experiment=advected_rain "priors=[gaussianize]" noise.levels=12 out="$work/tails"

# 64 snapshots, each seen by 40 gauges in places of its own
# shellcheck disable=SC2086
appa-lite simulate $snapshots trajectories=1 frames=64 seed=1 out="$work/truth.zarr"
appa-lite observe experiment=advected_rain truth="$work/truth.zarr" out="$work/gauges.parquet"
appa-lite reanalysis experiment=advected_rain checkpoint="$work/tails/gaussianize/seed_0/model" observations="$work/gauges.parquet" \
    members=15 out="$work/model.zarr"
# shellcheck disable=SC2086
appa-lite reanalysis $snapshots forecaster=hidden_gaussian observations="$work/gauges.parquet" members=15 batch=15 out="$work/exact.zarr"

# ranks of the truth in both, and of a member of the exact posterior in the model's
appa-lite verify forecast="$work/model.zarr" "baselines={exact: $work/exact.zarr}" truth="$work/truth.zarr" \
    observed="$work/gauges.parquet" out="$work/scores.json"
appa-lite verify forecast="$work/model.zarr" truth="$work/exact.zarr" observed="$work/gauges.parquet" out="$work/scores_exact.json"
