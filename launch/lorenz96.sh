#!/usr/bin/env bash
# Makes checkpoints/lorenz96 again, from nothing, and scores it. Argument: a directory to work in (runs/lorenz96).
source "$(dirname "$0")/setup.sh"
work=${1:-runs/lorenz96}
model=$work/denoiser/model
appa-lite simulate experiment=lorenz96 out="$work/train.zarr" trajectories=64 frames=400 seed=1
appa-lite simulate experiment=lorenz96 out="$work/validation.zarr" trajectories=8 frames=400 seed=2
appa-lite simulate experiment=lorenz96 out="$work/test.zarr" trajectories=1 frames=120 seed=3
appa-lite train experiment=lorenz96 trainable=identity data="$work/train.zarr" validation="$work/validation.zarr" run="$work/identity"
appa-lite train experiment=lorenz96 trainable=denoiser autoencoder="$work/identity/model" \
    data="$work/train.zarr" validation="$work/validation.zarr" run="$work/denoiser"
for network in lorenz96_all lorenz96_eight; do
    appa-lite observe experiment=lorenz96 truth="$work/test.zarr" network=$network out="$work/$network.parquet"
    for method in latent_diffusion optimal_interpolation; do
        appa-lite reanalysis experiment=lorenz96 checkpoint="$model" observations="$work/$network.parquet" \
            forecaster=$method members=8 out="$work/${network}_$method.zarr"
    done
    appa-lite verify forecast="$work/${network}_latent_diffusion.zarr" name=latent_diffusion truth="$work/test.zarr" checkpoint="$model" \
        "baselines={optimal_interpolation: $work/${network}_optimal_interpolation.zarr}" out="$work/scores_$network.json"
done
