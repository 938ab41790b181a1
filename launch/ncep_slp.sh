#!/usr/bin/env bash
# Daily sea-level pressure over the North Atlantic: from training to scores of a reanalysis and of forecasts of 2010.
#   bash launch/ncep_slp.sh DATA [OUT]     DATA holds ncep_slp_daily_2001-2010_north_atlantic.nc
source "$(dirname "$0")/setup.sh"
DATA=${1:?"usage: bash launch/ncep_slp.sh DATA [OUT]"}
OUT=${2:-runs/ncep_slp}
GRID=$DATA/ncep_slp_daily_2001-2010_north_atlantic.nc

# the prior, from the fields of 2001 to 2008 (25 minutes)
appa-lite train experiment=ncep_slp trainable=identity data="$GRID" run="$OUT/identity"
appa-lite train experiment=ncep_slp trainable=denoiser autoencoder="$OUT/identity/model" data="$GRID" run="$OUT/denoiser"

# sixty days of 2010 from eleven points a day, with errors of 100 Pa
appa-lite observe experiment=ncep_slp truth="$GRID" start=2010-01-11 end=2010-03-11 out="$OUT/observations.parquet"
for name in latent_diffusion optimal_interpolation; do
    appa-lite reanalysis experiment=ncep_slp checkpoint="$OUT/denoiser/model" observations="$OUT/observations.parquet" \
        forecaster=$name out="$OUT/$name.nc"
done
appa-lite verify experiment=ncep_slp forecast="$OUT/latent_diffusion.nc" "baselines={optimal_interpolation: $OUT/optimal_interpolation.nc}" \
    truth="$GRID" checkpoint="$OUT/denoiser/model" out="$OUT/scores_reanalysis.json"

# one to five days ahead, from the analysed fields of every eighteenth day of 2010
DAYS=$(python - <<'PY'
import datetime
print(",".join(str(datetime.date(2010, 1, 8) + datetime.timedelta(days=18 * i)) for i in range(20)))
PY
)
appa-lite forecast experiment=ncep_slp checkpoint="$OUT/denoiser/model" initial="$GRID" "initial_time=[$DAYS]" lead=5d out="$OUT/forecast.nc"
appa-lite verify experiment=ncep_slp forecast="$OUT/forecast.nc" truth="$GRID" checkpoint="$OUT/denoiser/model" out="$OUT/scores_forecast.json"
