#!/usr/bin/env bash
# The whole job, small: cold start by supervised learning, then GSPO, on two processes with the experts split over them
# (two GPUs, or the CPU), on one process where there is one GPU.
#   bash launch/quickstart.sh [section.key=value ...]      overrides for the GSPO stage
#   COLD_START="section.key=value ..." bash launch/quickstart.sh     overrides for the cold start
#   RUN_DIR=runs/other SEED=2 bash launch/quickstart.sh     another folder, another seed
# A run that was stopped goes on where its last checkpoint stands.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(bash launch/install.sh)
run=${RUN_DIR:-runs/quickstart}
seed=${SEED:-1}

processes=$("$python" -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)')
launch() {
    bash launch/torchrun.sh --nproc-per-node "$processes" -- train "$1" "parallel.expert=$processes" "${@:2}"
}
if [ ! -d "$run/cold_start/hf" ]; then
    echo "== cold start: supervised, $run/cold_start"
    # shellcheck disable=SC2086
    launch examples/quickstart_sft.yaml "seed=$seed" "logging.run_dir=$run/cold_start" ${COLD_START:-}
    [ -d "$run/cold_start/hf" ] || exit 0 # a signal ended it; the same command goes on
fi
echo "== GSPO: $run"
launch examples/quickstart.yaml "seed=$seed" "model.hf=$run/cold_start/hf" "logging.run_dir=$run" "$@"
