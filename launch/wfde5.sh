#!/usr/bin/env bash
# Hourly fields over the British Isles from weather stations: from training to scores on stations left out.
#   bash launch/wfde5.sh DATA [OUT]     DATA holds wfde5_hourly_2017-01_british_isles.nc and met_eireann_hourly_2017-01_19stations.parquet
source "$(dirname "$0")/setup.sh"
DATA=${1:?"usage: bash launch/wfde5.sh DATA [OUT]"}
OUT=${2:-runs/wfde5}
GRID=$DATA/wfde5_hourly_2017-01_british_isles.nc
STATIONS=$DATA/met_eireann_hourly_2017-01_19stations.parquet
WEEK="start=2017-01-25 end=2017-01-31T23:00"

# the prior, from the fields of 1 to 21 January (minutes)
appa-lite train experiment=wfde5 trainable=identity data="$GRID" run="$OUT/identity"
appa-lite train experiment=wfde5 trainable=denoiser autoencoder="$OUT/identity/model" data="$GRID" run="$OUT/denoiser"

# what stations differ by from the fields, learned over the same weeks
appa-lite calibrate experiment=wfde5 observations="$STATIONS" truth="$GRID" out="$OUT/stations.parquet"

# the test week from fourteen stations
for name in latent_diffusion optimal_interpolation; do
    # shellcheck disable=SC2086
    appa-lite reanalysis experiment=wfde5 checkpoint="$OUT/denoiser/model" observations="$OUT/stations.parquet" \
        forecaster=$name $WEEK out="$OUT/$name.nc"
done

# scores at the five stations left out, beside kriging of the other fourteen
appa-lite verify experiment=wfde5 forecast="$OUT/latent_diffusion.nc" "baselines={optimal_interpolation: $OUT/optimal_interpolation.nc}" \
    observations="$OUT/stations.parquet" kriging="$OUT/stations.parquet" checkpoint="$OUT/denoiser/model" out="$OUT/scores.json"
