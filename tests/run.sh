#!/usr/bin/env bash
# Runs the tests in the project's own venv; arguments go to pytest.
#   bash tests/run.sh -m slow                  the ones that take minutes
#   PYTHON=python3.12 bash tests/run.sh        another interpreter, and with it another megatron-core
#   GSPO_MOE_PYTHON=python3 bash tests/run.sh  a Python that has what is needed; nothing is installed
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(bash launch/install.sh)
export OMP_NUM_THREADS=1
[ -n "${GSPO_MOE_PYTHON:-}" ] && export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m pytest "$@"
