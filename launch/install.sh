#!/usr/bin/env bash
# Makes .venv with pinned requirements and this project in it; a second call is quick. Prints the Python to run.
#   PYTHON=python3.12 bash launch/install.sh   another interpreter, in a venv of its own
#   GSPO_MOE_PYTHON=python3 bash launch/install.sh   one that has what is needed: nothing is installed, no network
#   GSPO_MOE_CUDA=0 bash launch/install.sh     no CUDA kernels, though there is an nvcc
#   GSPO_MOE_TORCH=cuda bash launch/install.sh torch's CUDA build, though there is no GPU here, as on a login node (or cpu)
set -euo pipefail
if [ -n "${GSPO_MOE_PYTHON:-}" ]; then
    given=$(command -v "$GSPO_MOE_PYTHON") || {
        echo "install: there is no GSPO_MOE_PYTHON=$GSPO_MOE_PYTHON; name a Python >= 3.11 that has what is needed" >&2
        exit 2
    }
    [[ $given = /* ]] || given=$PWD/$given
    cd "$(dirname "$0")/.."
    "$given" -m gspo_moe.packages || exit 2
    echo "$given"
    exit
fi
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'pass' 2>/dev/null && command -v pyenv >/dev/null; then
    # pyenv knows interpreters that its own shims refuse to start by name.
    version=$(pyenv versions --bare | grep -E "^${python#python}(\.|$)" | tail -n 1 || true)
    [ -n "$version" ] && python="$(pyenv root)/versions/$version/bin/python"
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "install: ${python} is no Python >= 3.11; name one with PYTHON=python3.11" >&2
    exit 2
fi

venv=.venv
[ -n "${PYTHON:-}" ] && venv=.venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stamp=$venv/installed
kernels=$(find gspo_moe/kernels/csrc gspo_moe/kernels/build.py -type f | sort)
wanted=$(cat launch/install.sh launch/requirements.txt pyproject.toml setup.py $kernels | cksum; pwd; echo "${GSPO_MOE_CUDA:-auto}")
build=${GSPO_MOE_TORCH:-auto}
case $build in
    auto) nvidia-smi -L >/dev/null 2>&1 && build=cuda || build=cpu ;;
    cpu | cuda) ;;
    *)
        echo "install: GSPO_MOE_TORCH=$build: give cpu, cuda, or leave it out" >&2
        exit 2
        ;;
esac
# A venv with the CUDA build runs everywhere; one with the CPU build leaves GPUs idle.
made=$(cat "$venv/torch-build" 2>/dev/null || true)
if [ -z "$made" ] && [ -x "$venv/bin/python" ] && "$venv/bin/python" -c \
    'import sys; from importlib.metadata import version; sys.exit("+cpu" not in version("torch"))' 2>/dev/null; then
    made=cpu
fi
replace=
if [ "$build" = cuda ] && [ "$made" = cpu ]; then
    echo "install: $venv has torch's CPU build, as no GPU was seen where it was made; taking the CUDA build" >&2
    replace=yes
fi
if [ -n "$replace" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "install: setting up $venv" >&2
    "$python" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet"
    if [ -n "$replace" ] && ! $pip --upgrade --force-reinstall --no-deps "torch==2.13.0" >&2; then
        echo "install: torch's CUDA build cannot be had here; where it can, run GSPO_MOE_TORCH=cuda bash launch/install.sh" >&2
        exit 2
    fi
    if [ "$build" = cpu ] && [ "$made" != cuda ]; then
        # Without a GPU the CPU build: from pip's own sources, else from PyTorch's CPU index, else what pip has.
        cpu_index="--retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu"
        $pip "torch==2.13.0+cpu" 2>/dev/null || $pip $cpu_index "torch==2.13.0+cpu" 2>/dev/null ||
            {
                echo "install: no CPU build of torch within reach; taking pip's default build, which is large" >&2
                build=cuda
            }
    fi
    $pip --requirement launch/requirements.txt >&2
    $pip --no-deps --no-build-isolation --editable . >&2
    [ "$made" = cuda ] && [ -z "$replace" ] || echo "$build" >"$venv/torch-build"
    echo "$wanted" >"$stamp"
fi
echo "$PWD/$venv/bin/python"
