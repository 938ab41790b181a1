#!/usr/bin/env bash
# Radar rain over France: from the sample of MeteoNet to nowcasts beside advection and persistence, and the learned law beside the observed.
#   bash launch/radar_rain.sh DATA [OUT]     DATA holds rainfall_{NW,SE}_2016_08.3.npz, and data_Radar_grid_cell_vals.csv for return levels
source "$(dirname "$0")/setup.sh"
DATA=${1:?"usage: bash launch/radar_rain.sh DATA [OUT]"}
OUT=${2:-runs/radar_rain}

# once: pickled arrays to CF zarr, domains of 64 x 64 cells (how they are chosen: launch/radar_rain.py)
python launch/radar_rain.py "$DATA" "$OUT/data"

# the prior, from 28 August 10:00-11:10
RAIN="data=$OUT/data/train.zarr validation=$OUT/data/validation.zarr"
# shellcheck disable=SC2086
appa-lite train experiment=radar_rain trainable=autoencoder $RAIN run="$OUT/autoencoder"
# shellcheck disable=SC2086
appa-lite train experiment=radar_rain trainable=denoiser autoencoder="$OUT/autoencoder/model" $RAIN run="$OUT/denoiser"

# 5 to 25 minutes ahead from three radar images: two domains that afternoon, three in the night two and a half days later
for part in afternoon night; do
    truth=afternoon times=2016-08-28T13:10,2016-08-28T13:20,2016-08-28T13:30
    [ $part = afternoon ] || truth=night_truth times=2016-08-30T23:55,2016-08-31T00:05
    for domain in 0 1 2; do
        case=$part$domain
        [ $case != afternoon2 ] || continue
        appa-lite forecast experiment=radar_rain checkpoint="$OUT/denoiser/model" initial="$OUT/data/$part.zarr" trajectory="$domain" \
            initial_time="[$times]" lead=25min out="$OUT/$case.nc"
        appa-lite forecast experiment=radar_rain forecaster=advection initial="$OUT/data/$part.zarr" trajectory="$domain" \
            initial_time="[$times]" lead=25min members=1 out="$OUT/${case}_advection.nc"
        appa-lite verify experiment=radar_rain forecast="$OUT/$case.nc" name=latent_diffusion trajectory="$domain" \
            "baselines={advection: $OUT/${case}_advection.nc}" truth="$OUT/data/$truth.zarr" thresholds="$OUT/data/train.zarr" \
            checkpoint="$OUT/denoiser/model" verification=quick verification.spectra=true out="$OUT/scores/$case.json"
    done
done

# one table of the five domains, the law without any observation beside what was observed, return levels of a longer record, pictures
python launch/radar_rain_report.py "$DATA" "$OUT"
