#!/usr/bin/env bash
# Starts gspo-moe, or a Python script, on the processes of one host or of several.
#   bash launch/torchrun.sh [options] -- train CONFIG.yaml section.key=value ...
#   bash launch/torchrun.sh [options] -- tools/benchmark_throughput.py CONFIG.yaml ...
# options:
#   --nodes N                   hosts (1); the same command is started on each of them
#   --nproc-per-node G          processes on this host (one a GPU; 1 without a GPU)
#   --rdzv-endpoint HOST:PORT   where several hosts meet: one of them, and a port that is free there
#   --local-addr ADDRESS        where the others find this host (the address from which it reaches the endpoint)
#   --dry-run                   print the command, check what a training is told (gspo-moe train --check), and stop
#   --help                      print this
#   any other of torchrun       such as --max-restarts 3, --log-dir DIR --tee 3, --rdzv-id NAME
# GSPO_MOE_PYTHON=python3 runs on a Python that has all packages, as a container's may: without pip, network, or .venv.
# The rendezvous deals out the ranks, so a host needs no number; every host must see the same logging.run_dir.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# As a signal to the ranks ends them, so one before there are any; what bash has begun, it waits for.
trap 'echo "torchrun.sh: a signal ends it: no rank runs here" >&2; exit 0' USR1 TERM INT
source "$root/launch/options.sh"
declare -A option=([nodes]=1 [nproc-per-node]="" [rdzv-endpoint]="" [local-addr]="")
declare -A switches=([dry-run]="")
handed_on=()
read_options "$@"
whole_numbers nodes ${option[nproc-per-node]:+nproc-per-node}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c . || true)
python=$root/.venv/bin/python
cpu_build=$(grep -sx cpu "$root/.venv/torch-build" || true)
if [ -n "${PYTHON:-}${GSPO_MOE_PYTHON:-}" ] || [ ! -x "$root/.venv/bin/torchrun" ] ||
    { [ "$gpus" -gt 0 ] && [ -n "$cpu_build" ]; }; then
    python=$(bash "$root/launch/install.sh")
fi
environment=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
# Nothing is installed there, so this folder's code is found by its place.
[ -n "${GSPO_MOE_PYTHON:-}" ] && environment+=("PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
processes=gpu
if [ "$gpus" = 0 ]; then
    processes=1
    # glibc gives big buffers back to the kernel at every step otherwise, which costs a CPU run dearly.
    environment+=(MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000)
fi
if [ "${option[nodes]}" = 1 ]; then
    meeting=(--standalone)
else
    endpoint=${option[rdzv-endpoint]}
    [ -n "$endpoint" ] || fail "--nodes ${option[nodes]} needs --rdzv-endpoint HOST:PORT, the same on every host"
    # torchrun and gloo would go by the host's name, which to the host itself often means its loopback.
    found=$("$python" "$root/launch/address.py" "$endpoint" ${option[local-addr]:+"${option[local-addr]}"})
    read -r address interface is_host <<<"$found"
    environment+=("GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}")
    meeting=(--nnodes "${option[nodes]}" --rdzv-backend c10d --rdzv-endpoint "$endpoint"
        ${is_host:+--rdzv-conf "is_host=$is_host"} --local-addr "$address")
fi
case ${run[0]} in
    *.py) program=("${run[@]}") ;;
    *) program=(-m gspo_moe "${run[@]}") ;;
esac
command=(env "${environment[@]}" "$python" "$root/launch/elastic.py" "${meeting[@]}"
    --nproc-per-node "${option[nproc-per-node]:-$processes}" "${handed_on[@]}" "${program[@]}")
if [ -n "${switches[dry-run]}" ]; then
    trap - USR1 TERM INT
    printf '%q ' "${command[@]}"
    echo
    [ "${run[0]}" = train ] || exit 0
    here=${option[nproc-per-node]:-$((gpus > 0 ? gpus : 1))}
    env "${environment[@]}" "$python" -m gspo_moe "${run[@]}" --check --world-size $((here * option[nodes])) >&2
    exit
fi
exec "${command[@]}"
