#!/usr/bin/env bash
# Several nodes under Slurm, one launcher on each; the job queues itself again until the training is done:
#
#   sbatch --nodes=4 --gpus-per-node=4 launch/slurm.sh STRATEGY run=DIR [key=value ...]
#   sbatch --nodes=4 --gpus-per-node=4 launch/slurm.sh fsdp2 run=runs/prior experiment=ocean trainable=denoiser data=...
#
# STRATEGY is a file of launch/accelerate (multi_node, zero2, fsdp2, ...) whose numbers of machines and processes are
# replaced by the job's. 240 seconds before the time limit Slurm sends SIGTERM to this script, which hands it to the
# launchers; they give their processes SHUTDOWN seconds to save. Whether the training is done is read from summary.json:
# the launchers' exit status is 1 after any signal, even when everything was saved.
#SBATCH --job-name=appa-lite
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@240
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ $# -lt 2 ] || [ "${2#run=}" = "$2" ]; then
    echo "usage: sbatch [options] launch/slurm.sh STRATEGY run=DIR [key=value ...]" >&2
    exit 2
fi
config="launch/accelerate/$1.yaml"
run=${2#run=}
shift
[ -f "$config" ] || { echo "slurm.sh: there is no $config: choose from $(cd launch/accelerate && echo *.yaml)" >&2; exit 2; }
[ ! -x .venv/bin/python ] || export PATH="$PWD/.venv/bin:$PATH"

SHUTDOWN=${SHUTDOWN:-180}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN  # else the launchers kill after 30 s what has not saved
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-4}}
nodes=${SLURM_NNODES:-1}
per_node=${SLURM_GPUS_ON_NODE:-1}
export CONFIG=$config NODES=$nodes PROCESSES=$((nodes * per_node)) PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN

# Each node fills in its own rank; exec, so that the signal reaches the launcher itself.
# shellcheck disable=SC2016
srun bash -c 'exec accelerate launch --config_file "$CONFIG" --num_machines "$NODES" --num_processes "$PROCESSES" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port "$PORT" -m appa_lite train "$@"' \
    launch "$@" "training.grace=$((SHUTDOWN - 10))" &
launchers=$!
stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$launchers"
status=$?
while [ -n "$stopped" ] && kill -0 "$launchers" 2>/dev/null; do
    wait "$launchers"
done
if [ -f "$run/summary.json" ]; then
    exit 0
fi
if [ -n "$stopped" ] || [ "${RETRY_FAILED:-0}" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
