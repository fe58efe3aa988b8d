#!/usr/bin/env bash
# What builds, what passes and how fast it is on a machine with a GPU, in under ten minutes; docs/gpu.md explains it.
#   OUT=FOLDER bash tools/gpu_check.sh           report.txt, report.json, log.txt, profile.txt, tests.xml in FOLDER
#                                                (runs/gpu_check)
#   STAGES="env build slice" bash tools/gpu_check.sh    some of the stages, which are listed at the end
#   bash tools/gpu_check.sh --prepare            puts the wheels that a bare GPU image lacks into .gpu, and the commit
#   DRY=1 bash tools/gpu_check.sh                everything tiny and on the CPU: checks this script alone
# Python is GSPO_MOE_PYTHON; else python3 where WHEELS (.gpu/wheels) has some, which any Python then uses; else the venv's.
# TOTAL=560 seconds (3600 when dry) for everything. Each stage has its limit, and the report is written anew behind each.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=${WHEELS:-$root/.gpu/wheels}

prepare() {
    rm -rf "$wheels" && mkdir -p "$wheels" # two versions of a package would stop the installation
    local platforms="" version
    for version in 2_28 2_27 2_24 2_17; do platforms+=" --platform manylinux_${version}_x86_64"; done
    local download="python3 -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version 3.12
        --implementation cp $platforms --platform manylinux2014_x86_64 --dest $wheels"
    local ours peers
    ours=$(grep -E '^(psutil|pydantic)==' "$root/launch/requirements.txt")
    peers=$(grep -E '^(trl|datasets|dill|multiprocess)==' "$root/tools/requirements_trl.txt")
    $download $ours && $download --no-deps megatron-core==0.19.2 $peers liger-kernel==0.8.5 || return 1
    git -C "$root" describe --always --dirty --abbrev=40 --match= >"$root/.gpu/commit"
    du -sh "$root/.gpu"
}

case ${1:-} in
    "") ;;
    --prepare)
        prepare
        exit
        ;;
    *)
        echo "gpu_check.sh: no argument ${1}; the only one is --prepare, all else is set in the environment" >&2
        exit 2
        ;;
esac

stages="env build kernels slice tests baseline mismatch mismatch_fp32 quickstart"
for name in ${STAGES:-}; do
    [[ " $stages " == *" $name "* ]] || {
        echo "gpu_check.sh: STAGES names $name; there are $stages" >&2
        exit 2
    }
done

export GPU_CHECK_COMMAND="OUT=${OUT:-} STAGES=${STAGES:-} TOTAL=${TOTAL:-} DRY=${DRY:-} GSPO_MOE_PYTHON=${GSPO_MOE_PYTHON:-} bash tools/gpu_check.sh"
begun=$(date +%s)
mkdir -p "${OUT:=$root/runs/gpu_check}" && OUT=$(CDPATH= cd -- "$OUT" && pwd) || exit
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
log=$OUT/log.txt
: >"$log"
cd "$root" || exit
[ -z "${DRY:-}" ] || export CUDA_VISIBLE_DEVICES=
if compgen -G "$wheels/*.whl" >/dev/null; then
    export GSPO_MOE_PYTHON=${GSPO_MOE_PYTHON:-python3}
    "$GSPO_MOE_PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --upgrade --target "$parts/site" "$wheels"/*.whl || exit
    export PYTHONPATH=$parts/site${PYTHONPATH:+:$PYTHONPATH}
fi
python=$(bash launch/install.sh) || exit
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$([ -n "${DRY:-}" ] && echo 1 || echo 8)}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5

# A machine that others use, as a dry run's may be, can take several times as long.
total=${TOTAL:-$([ -n "${DRY:-}" ] && echo 3600 || echo 560)}
stretch=$([ -n "${DRY:-}" ] && echo 5 || echo 1)

# stage NAME LIMIT COMMAND...: runs it if it is asked for, within its limit and what is left of the whole.
stage() {
    local name=$1 limit=$2 start left code
    shift 2
    limit=$((limit * stretch))
    [[ " ${STAGES:-$name} " == *" $name "* ]] || return 0
    start=$(date +%s)
    left=$((total - start + begun))
    if [ "$left" -lt 15 ]; then
        echo "== $name: left out, $left s left" | tee -a "$log"
        return 0
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    echo "== $name, at most $limit s" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    echo "$name $code $(($(date +%s) - start))" >>"$parts/stages.txt"
    "$python" tools/gpu_report.py "$parts" "$OUT"
}

build() {
    local output=$1
    if [ -z "${DRY:-}" ] && ! GSPO_MOE_CUDA=1 "$python" setup.py -q build_ext --inplace >"$output" 2>&1; then
        tail -n 25 "$output"
        return 1
    fi
    "$python" -c 'import os; from gspo_moe.kernels import kernels
print("kernels:", *kernels().summary)
raise SystemExit(not (kernels().cpu if os.environ.get("DRY") else kernels().cuda))'
}

quickstart() {
    local metrics=$1 run
    run=$(mktemp -d)
    RUN_DIR=$run COLD_START="schedule.steps=$2 logging.progress=false" OMP_NUM_THREADS=1 bash launch/quickstart.sh \
        schedule.steps="$3" evaluation.prompts=64 logging.progress=false
    local code=$?
    cp "$run/metrics.jsonl" "$metrics"
    rm -rf "$run"
    return $code
}
export -f build quickstart
export python

slice="tools/gpu_slice.yaml"
xdist=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")
if [ -n "${DRY:-}" ]; then
    sizes="--device cpu --tokens 64 --vocab 1024 --hidden 64 --repeats 1 --threads 1 --no-compile"
    slice+=" model.preset=tiny model.overrides.num_hidden_layers=2 rollout.prompts_per_step=4 rollout.samples_per_prompt=2
        rollout.max_response_tokens=6 schedule.micro_batch_tokens=64 --synthetic 10 --warmup 1"
    steps="2 1" shorter="" xdist=""
else
    sizes="--device cuda --tokens 8192 --dtypes bfloat16 --repeats 10 --without trl_selective_log_softmax"
    slice+=" --synthetic 256 --warmup 1"
    steps="60 4" shorter="model.overrides.num_hidden_layers=2 rollout.max_response_tokens=64"
fi
# shellcheck disable=SC2086
{
    stage env 60 "$python" tools/gpu_environment.py "$parts/env.json"
    stage build 150 bash -c 'build "$0"' "$parts/build.txt"
    stage kernels 120 "$python" tools/benchmark_kernels.py $sizes --json "$parts/kernels.json"
    stage slice 130 "$python" tools/benchmark_throughput.py $slice --steps 2 --json "$parts/slice.json" --profile "$OUT/profile.txt"
    stage tests 150 env OMP_NUM_THREADS=1 "$python" -m pytest tests/gpu $xdist -vv -o faulthandler_timeout=60 -p no:cacheprovider --junitxml="$parts/tests.xml"
    stage baseline 110 "$python" tools/benchmark_trl.py $slice --steps 1 --json "$parts/baseline.json"
    shorter="$slice $shorter routing.engine_routes=true --warmup 0 --steps 1"
    stage mismatch 60 "$python" tools/benchmark_throughput.py $shorter --json "$parts/mismatch.json"
    stage mismatch_fp32 60 "$python" tools/benchmark_throughput.py $shorter model.dtype=fp32 --json "$parts/mismatch_fp32.json"
    stage quickstart 110 bash -c 'quickstart "$@"' quickstart "$parts/quickstart.jsonl" $steps
}
cp "$parts/tests.xml" "$OUT" 2>/dev/null
echo | tee -a "$log"
tee -a "$log" <"$OUT/report.txt"
