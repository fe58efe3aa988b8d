#!/usr/bin/env bash
# Runs the tests in the project's own venv, several files at once; arguments go to pytest instead.
#   bash tests/run.sh -m slow                  the ones that take minutes
#   PYTHON=python3.12 bash tests/run.sh        another interpreter, and with it another megatron-core
#   GSPO_MOE_PYTHON=python3 bash tests/run.sh  a Python that has what is needed; nothing is installed
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(bash launch/install.sh)
export OMP_NUM_THREADS=1
[ -n "${GSPO_MOE_PYTHON:-}" ] && export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
[ $# -gt 0 ] && exec "$python" -m pytest "$@"
failed=0
"$python" -m pytest tests/unit -n logical --maxprocesses 4 --dist loadfile || failed=$?
# The others wait for processes that they start: one more at once than there are cores, the longest files first.
"$python" -m pytest --ignore tests/unit -n $(($(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 4 \
    --dist loadfile --no-loadscope-reorder || failed=$?
exit $failed
