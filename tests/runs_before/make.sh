#!/usr/bin/env bash
# Made what lies beside it, with commit 2f602fb: bash make.sh EMPTY_FOLDER. Made anew it would prove nothing:
# tests/e2e/test_before.py holds that later code goes on with these files, with the numbers in expected/.
set -euo pipefail
files=$(cd "$(dirname "$0")" && pwd)
cd "$1"
gspo_moe() { OMP_NUM_THREADS=1 "${PYTHON:-python}" -m gspo_moe "$@"; }

gspo_moe train "$files/sft.yaml"
cp -r sft/hf start
gspo_moe train "$files/rl.yaml"
gspo_moe bank "$files/rl.yaml" bank.safetensors schedule.steps=1
cp -r run continued
gspo_moe train "$files/rl.yaml" schedule.steps=3 logging.run_dir=continued
gspo_moe train "$files/rl.yaml" schedule.steps=1 logging.run_dir=from_bank rollout.bank=bank.safetensors
gspo_moe train "$files/rl.yaml" schedule.steps=1 logging.run_dir=ppo algorithm.name=ppo algorithm.ppo.lam=0.9
mkdir -p expected/continued expected/from_bank expected/ppo
for run in continued from_bank; do cp $run/metrics.jsonl expected/$run; done
cp ppo/config.yaml expected/ppo
rm -r sft continued from_bank ppo run/run.lock run/curves.png
