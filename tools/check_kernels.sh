#!/usr/bin/env bash
# Proves what can be proved of the CUDA kernels without a GPU, a line a stage; needs nvcc and g++.
#   bash tools/check_kernels.sh --seed N      a run's random cases again
#   bash tools/check_kernels.sh --matrix      which stage catches which seeded bug
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(bash launch/install.sh)
export OMP_NUM_THREADS=1
exec "$python" -m tests.unit.kernels.cuda.proof "$@"
