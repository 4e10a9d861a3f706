#!/usr/bin/env bash
# Pretrains on TPU slices of a GKE cluster with XPK, Google's tool that writes and submits the JobSet.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/xpk.sh --cluster CLUSTER --name NAME --image IMAGE [OPTIONS] -- --config RECIPE --workdir DIR ...

Pretrains on TPU slices of a GKE cluster that XPK has made (pip install xpk; xpk cluster create). What follows -- is
handed to `datencoder pretrain` on every machine, where JAX finds the others by itself. Without XPK, see
launch/gke_jobset.yaml.

options:
  --cluster CLUSTER  the GKE cluster
  --name NAME        what the workload is called
  --image IMAGE      what launch/Dockerfile builds with EXTRA=tpu
  --type TYPE        of a slice (default: v5litepod-16)
  --slices N         how many slices (default: 1)
  --project PROJECT  (default: gcloud's own)
  --zone ZONE        (default: gcloud's own)
  --storage NAME     storage that was attached to the cluster with `xpk storage`, for data and --workdir
  --dry-run          print the command instead of running it
  --help             show this

example:
  launch/xpk.sh --cluster pods --name sd15 --image us-docker.pkg.dev/me/my/datencoder:tpu --type v5litepod-256 \
      --storage runs -- --config configs/sd15_laion.py --workdir /mnt/runs/sd15
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

cluster="" name="" image="" type=v5litepod-16 slices=1 project="" zone="" storage="" dry_run=""
while (($#)); do
    case $1 in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --) shift && break ;;
        --cluster | --name | --image | --type | --slices | --project | --zone | --storage)
            (($# > 1)) || fail "$1 needs a value; see --help."
            declare "${1#--}=$2"
            shift 2
            ;;
        *) fail "the option $1 is not known; see --help. Options of datencoder pretrain come after --." ;;
    esac
done
[[ -n $cluster && -n $name && -n $image ]] || fail "--cluster, --name and --image are needed; see --help."
(($#)) || fail "say what to train after --, such as -- --config configs/sd15_laion.py --workdir /mnt/runs/sd15."

# Ended early, a machine has ten minutes to write a checkpoint; a workload that fails is started again from it, unless
# it was for a mistake in the options (status 2).
command=(xpk workload create "--cluster=$cluster" "--workload=$name" "--docker-image=$image" "--tpu-type=$type"
    "--num-slices=$slices" --max-restarts=20 --restart-on-exit-codes=1 --termination-grace-period-seconds=600
    ${project:+"--project=$project"} ${zone:+"--zone=$zone"} ${storage:+"--storage=$storage"}
    "--command=$(printf '%q ' datencoder pretrain "$@")")
if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}" && echo
else
    exec "${command[@]}"
fi
