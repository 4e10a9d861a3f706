#!/usr/bin/env bash
# The values below can all be given to sbatch instead, which goes before them: sbatch --nodes=16 --time=4:00:00 ...
#SBATCH --job-name=datencoder
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@600
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: sbatch [OPTIONS OF sbatch] launch/slurm.sh --config RECIPE --workdir DIR [OPTIONS OF datencoder pretrain]

Pretrains on the nodes of a Slurm job, with one process on each node that drives all of its GPUs; JAX learns from Slurm
where the others are. The work folder and the data have to lie where all nodes see them.

Ten minutes before its time is up the job is told to stop: it writes a checkpoint and ends. Submit the same line several
times with --dependency=singleton, and each job goes on where the one before it stopped; those left over when the
training is complete end at once. A job that is preempted, or whose node fails, is queued again by Slurm.

environment:
  DATENCODER  how the program is started (default: datencoder), such as
              "apptainer exec --nv datencoder.sif datencoder"

example:
  for i in 1 2 3; do
      sbatch --nodes=4 --dependency=singleton launch/slurm.sh --config configs/sd15_laion.py --workdir /shared/runs/sd15
  done
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

case ${1:-} in
    --help | -h) usage && exit ;;
esac
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no Slurm job; start it with sbatch, see --help."
(($#)) || fail "say what to train, such as --config configs/sd15_laion.py --workdir /shared/runs/sd15."

read -ra datencoder <<<"${DATENCODER:-datencoder}"
# srun no longer takes this from the job by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# What is left of a step after one process has failed would wait for it in vain.
exec srun --kill-on-bad-exit=1 "${datencoder[@]}" pretrain "$@"
