#!/usr/bin/env bash
# Runs the tests in the project's own venv; arguments go to pytest.
#   bash tests/run.sh -m slow                  the ones that take minutes
#   PYTHON=python3.12 bash tests/run.sh        another interpreter, and with it another megatron-core
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(bash launch/install.sh)
export OMP_NUM_THREADS=1
exec "$venv/bin/python" -m pytest "$@"
