#!/usr/bin/env bash
# Pretrains on a slice of TPU VMs: the same container, with the same command, on every machine of the slice.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/tpu_vm.sh ACTION --name NAME --zone ZONE [OPTIONS] [-- --config RECIPE --workdir DIR ...]

Pretrains on a slice of TPU VMs. What follows -- is handed to `datencoder pretrain` on every machine of the slice,
where JAX finds the others by itself.

actions, in the order of their use:
  create   ask for the slice, and wait in Google's queue
  status   say how the request stands
  setup    fetch the image on every machine
  run      start `datencoder pretrain`; a process that fails is started again and goes on from its last checkpoint
  logs     show what the first machine prints, until Ctrl-C
  stop     end the training; it writes a checkpoint first, and `run` goes on from there
  delete   give the slice back

options:
  --name NAME        what the slice is called
  --zone ZONE        such as us-central1-a
  --project PROJECT  (default: gcloud's own)
  --type TYPE        accelerator type (default: v5litepod-16)
  --version VERSION  runtime version (default: v2-alpha-tpuv5-lite)
  --spot             cheaper machines, which may be taken away at any time
  --image IMAGE      what launch/Dockerfile builds with EXTRA=tpu; for setup and run
  --mount DIR        a folder that all machines share, such as an NFS share they mount; for data, --workdir and what is
                     downloaded and compiled (default: /mnt)
  --dry-run          print the commands instead of running them
  --help             show this

example:
  launch/tpu_vm.sh create --name pod --zone us-central1-a --type v5litepod-256
  launch/tpu_vm.sh run --name pod --zone us-central1-a --image us-docker.pkg.dev/me/my/datencoder:tpu \
      -- --config configs/sd15_laion.py --workdir /mnt/runs/sd15
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

name="" zone="" project="" image="" mount=/mnt dry_run="" spot=""
type=v5litepod-16 version=v2-alpha-tpuv5-lite action=""
while (($#)); do
    case $1 in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --spot) spot=1 && shift ;;
        --) shift && break ;;
        --name | --zone | --project | --type | --version | --image | --mount)
            (($# > 1)) || fail "$1 needs a value; see --help."
            declare "${1#--}=$2"
            shift 2
            ;;
        -*) fail "the option $1 is not known; see --help. Options of datencoder pretrain come after --." ;;
        *)
            [[ -z $action ]] || fail "one action at a time, not $action and $1; see --help."
            action=$1 && shift
            ;;
    esac
done

[[ -n $action ]] || fail "name an action: create, status, setup, run, logs, stop or delete; see --help."
[[ -n $name && -n $zone ]] || fail "name the slice with --name and its zone with --zone."
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")

run() {
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}

# Runs a command on machines of the slice: `all`, or the number of one.
on() {
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
}

case $action in
    create)
        run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" \
            "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot}
        ;;
    status)
        run gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)"
        ;;
    setup)
        [[ -n $image ]] || fail "name the image with --image; launch/Dockerfile builds it."
        on all "sudo gcloud auth configure-docker --quiet ${image%%/*} && sudo docker pull $(printf '%q' "$image")"
        ;;
    run)
        [[ -n $image ]] || fail "name the image with --image; launch/Dockerfile builds it."
        (($#)) || fail "say what to train after --, such as -- --config configs/sd15_laion.py --workdir /mnt/runs/sd15."
        # TPUs are devices of the host, and its metadata and network tell JAX of the other machines. Processes end
        # together when one fails; each is then started again by its own machine.
        container=(sudo docker run --detach --init --name datencoder --restart on-failure:20 --privileged --net host
            --ulimit memlock=-1 --volume "$mount:$mount" --env "HF_HOME=$mount/huggingface"
            --env "DATENCODER_CACHE=$mount/datencoder" "$image")
        command=(datencoder pretrain "$@")
        on all "sudo docker rm --force datencoder >/dev/null 2>&1; $(printf '%q ' "${container[@]}" "${command[@]}")"
        ;;
    logs) on 0 "sudo docker logs --follow --tail 100 datencoder" ;;
    stop) on all "sudo docker stop --time 600 datencoder" ;;
    delete) run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force ;;
    *) fail "the action $action is not known: create, status, setup, run, logs, stop or delete." ;;
esac
