#!/usr/bin/env bash
# Makes checkpoints/ocean again, from nothing: about 2.5 hours of two CPU cores. Argument: a directory to work in (runs/ocean).
source "$(dirname "$0")/setup.sh"
work=${1:-runs/ocean}
appa-lite simulate experiment=ocean out="$work/train.zarr" trajectories=24 frames=750 seed=1
appa-lite simulate experiment=ocean out="$work/validation.zarr" trajectories=8 frames=250 seed=2
appa-lite train experiment=ocean trainable=autoencoder data="$work/train.zarr" validation="$work/validation.zarr" run="$work/autoencoder"
appa-lite train experiment=ocean trainable=denoiser autoencoder="$work/autoencoder/model" \
    data="$work/train.zarr" validation="$work/validation.zarr" run="$work/denoiser"
echo "$work/denoiser/model: the model directory"
