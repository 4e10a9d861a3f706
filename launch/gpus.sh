#!/usr/bin/env bash
# Pretrains on the GPUs of this machine: one process drives them all.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/gpus.sh [--gpus LIST] [--restarts N] -- --config RECIPE --workdir DIR [OPTIONS OF datencoder pretrain]

Pretrains on the GPUs of this machine, in one process that drives all of them. A run that fails is started again, and
goes on from its last checkpoint.

options:
  --gpus LIST   which GPUs, such as 0,1,2,3 (default: all)
  --restarts N  how often a failed run is started again (default: 10); not after Ctrl-C, nor after a mistake in the
                options
  --help        show this

environment:
  DATENCODER  how the program is started (default: datencoder), such as "docker run --init --gpus all ... datencoder"

example:
  launch/gpus.sh -- --config configs/sd15_laion.py --workdir runs/sd15
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

restarts=10
while (($#)); do
    case $1 in
        --help | -h) usage && exit ;;
        --) shift && break ;;
        --gpus)
            (($# > 1)) || fail "--gpus needs a list, such as 0,1."
            export CUDA_VISIBLE_DEVICES=$2
            shift 2
            ;;
        --restarts)
            [[ ${2:-} =~ ^[0-9]+$ ]] || fail "--restarts needs a number."
            restarts=$2
            shift 2
            ;;
        *) fail "the option $1 is not known; see --help. Options of datencoder pretrain come after --." ;;
    esac
done
(($#)) || fail "say what to train after --, such as -- --config configs/sd15_laion.py --workdir runs/sd15."

read -ra datencoder <<<"${DATENCODER:-datencoder}"
# The program is told to stop as this script is, and writes a checkpoint first; the script waits for it.
stopped=""
trap 'stopped=1; kill -TERM "$process" 2>/dev/null || true' TERM INT

for ((attempt = 0; ; attempt++)); do
    "${datencoder[@]}" pretrain "$@" &
    process=$!
    status=0
    wait "$process" || status=$?
    # A signal ends `wait` before the program has ended.
    while kill -0 "$process" 2>/dev/null; do wait "$process" && status=0 || status=$?; done
    # 0: complete; 2: a mistake in the options; 130: stopped.
    [[ -z $stopped && $status != 0 && $status != 2 && $status != 130 ]] || exit "$status"
    ((attempt < restarts)) || exit "$status"
    echo "datencoder pretrain failed with status $status; starting it again ($((attempt + 1)) of $restarts)" >&2
done
