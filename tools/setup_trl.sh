#!/usr/bin/env bash
# Makes a venv with TRL, for tools/benchmark_peers.py; a second call is quick. Prints what to run next.
#   bash tools/setup_trl.sh [DIR]             (.venv-trl)
#   PYTHON=python3.12 bash tools/setup_trl.sh   another interpreter
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$root/.venv-trl}
python=${PYTHON:-python3}

fail() {
    echo "setup_trl: $1" >&2
    exit 2
}
[ $# -le 1 ] && [[ $venv != -* ]] || fail "takes one folder, for the venv; call bash tools/setup_trl.sh [DIR]"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is no Python >= 3.11; name one with PYTHON=python3.11"
if [ -e "$venv" ] && [ ! -x "$venv/bin/python" ]; then
    fail "$venv is there and is no venv; name another folder"
fi
"$python" -m venv "$venv" || fail "no venv could be made in $venv; name another folder, or install Python's venv"
pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet"
if ! nvidia-smi -L >/dev/null 2>&1; then
    cpu_index="--retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu"
    $pip torch==2.13.0+cpu 2>/dev/null || $pip $cpu_index torch==2.13.0+cpu 2>/dev/null ||
        echo "setup_trl: no CPU build of torch within reach; taking pip's default build, which is large" >&2
fi
ours=$(grep -E '^(torch|psutil|pydantic|PyYAML|numpy|sentencepiece|tokenizers|safetensors)==' "$root/launch/requirements.txt")
$pip --requirement "$root/tools/requirements_trl.txt" $ours ||
    fail "the packages could not be installed; pip's message stands above, and a second call goes on from there"
venv=$(cd "$venv" && pwd)
PYTHONPATH=$root "$venv/bin/python" -c 'import trl, gspo_moe.config, tools.synthetic' ||
    fail "the venv in $venv does not load TRL and this project; remove it and call this again"
echo "TRL stands in $venv; run next:"
echo "    python tools/benchmark_peers.py --trl-python $venv/bin/python"
