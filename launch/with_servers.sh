#!/usr/bin/env bash
# Starts rollout servers and the trainer on one host, and ends the servers with the trainer.
#   bash launch/with_servers.sh --model HF_DIR [options] -- train CONFIG.yaml section.key=value ...
# options:
#   --model HF_DIR              what the servers load, until the trainer brings its weights: a folder with its architecture
#   --engine vllm|sglang        the kind of server (vllm)
#   --servers N                 how many (1)
#   --server-gpus 4,5,6,7       their GPUs, in equal parts, each server tensor parallel over its own; none on a CPU
#   --trainer-gpus 0,1,2,3      the trainer's
#   --nproc-per-node G          the trainer's processes on this host, as launch/torchrun.sh has it
#   --server-python PATH        a Python that has vLLM or SGLang (.venv-vllm/bin/python, else python3)
#   --server-options "..."      more of the server's own command line, such as "--logprobs-mode processed_logprobs"
#   --server-command "..."      another command altogether; {model}, {port} and {number} in it are replaced
#   --port PORT                 the first server's, the others' follow (8000)
#   --start-seconds S           for a server to load the model (1800)
#   --help                      print this
# Servers write to server_N.log in this folder; SERVER_LOGS=DIR names another.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/launch/options.sh"
declare -A option=([model]="" [engine]=vllm [servers]=1 [server-gpus]="" [trainer-gpus]="" [nproc-per-node]=""
    [server-python]="" [server-options]="" [server-command]="" [port]=8000 [start-seconds]=1800)
declare -A switches=()
read_options "$@"
[ -f "${option[model]}/config.json" ] ||
    fail "--model '${option[model]}' is no folder with a config.json; give the run's model"
[[ ${option[engine]} =~ ^(vllm|sglang)$ ]] || fail "--engine ${option[engine]}: give vllm or sglang"
whole_numbers servers port start-seconds
count=${option[servers]}
IFS=, read -r -a gpus <<<"${option[server-gpus]}"
each=$((${#gpus[@]} / count))
[ $((each * count)) = ${#gpus[@]} ] || fail "--server-gpus ${option[server-gpus]} cannot be split among $count servers"

python=${option[server-python]:-$root/.venv-vllm/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
command_of() { # NUMBER PORT: fills `serve`, and `around`, its environment
    around=(PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}")
    [ ${#gpus[@]} = 0 ] || around+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:$((each * $1)):each}")")
    if [ -n "${option[server-command]}" ]; then
        local filled=${option[server-command]//\{model\}/${option[model]}}
        filled=${filled//\{port\}/$2}
        read -r -a serve <<<"${filled//\{number\}/$1}"
        return
    fi
    read -r -a more <<<"${option[server-options]}"
    if [ "${option[engine]}" = vllm ]; then
        around+=(VLLM_SERVER_DEV_MODE=1)
        serve=("$python" -m vllm.entrypoints.cli.main serve "${option[model]}" --host 127.0.0.1 --port "$2"
            --tensor-parallel-size $((each > 0 ? each : 1))
            --worker-extension-cls gspo_moe.rollout.servers.worker.Extension --enable-scale-out "${more[@]}")
    else
        serve=("$python" -m sglang.launch_server --model-path "${option[model]}" --host 127.0.0.1 --port "$2"
            --tp-size $((each > 0 ? each : 1)) "${more[@]}")
    fi
}

logs=${SERVER_LOGS:-$PWD}
mkdir -p "$logs"
pids=()
urls=()
stop() {
    for pid in "${pids[@]}"; do
        kill -- "-$pid" 2>/dev/null || true
    done
    wait 2>/dev/null || true
}
trap stop EXIT
set -m # each server leads a group of its own, which ends with all that it started
for ((number = 0; number < count; number++)); do
    port=$((option[port] + number))
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        fail "something listens on port $port already; end it, or give another --port"
    fi
    command_of "$number" "$port"
    env "${around[@]}" "${serve[@]}" >"$logs/server_$number.log" 2>&1 </dev/null &
    pids+=($!)
    urls+=("http://127.0.0.1:$port")
done
set +m
for ((number = 0; number < count; number++)); do
    until (exec 3<>"/dev/tcp/127.0.0.1/$((option[port] + number))") 2>/dev/null; do # they listen once they can answer
        if ! kill -0 "${pids[number]}" 2>/dev/null; then
            tail -n 20 "$logs/server_$number.log" >&2
            fail "server $number ended before it was up; the end of $logs/server_$number.log stands above"
        fi
        ((SECONDS < option[start-seconds])) ||
            fail "server $number was not up within ${option[start-seconds]} s; see $logs/server_$number.log"
        sleep 1
    done
done
echo "with_servers.sh: $count ${option[engine]} up (${urls[*]}), logs in $logs" >&2

trainer=()
[ -z "${option[trainer-gpus]}" ] || trainer+=("CUDA_VISIBLE_DEVICES=${option[trainer-gpus]}")
env "${trainer[@]}" bash "$root/launch/torchrun.sh" \
    ${option[nproc-per-node]:+--nproc-per-node "${option[nproc-per-node]}"} -- "${run[@]}" "rollout.engine=${option[engine]}" \
    "rollout.servers.urls=[$(IFS=,; echo "${urls[*]}")]" &
trainer_pid=$!
# A signal to this script is the trainer's, which saves its last whole step.
trap 'kill -TERM "$trainer_pid"' TERM INT
trap 'kill -USR1 "$trainer_pid"' USR1
code=0
until wait "$trainer_pid"; do
    code=$?
    kill -0 "$trainer_pid" 2>/dev/null || break
    code=0
done
exit "$code"
