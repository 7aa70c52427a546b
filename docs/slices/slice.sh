#!/usr/bin/env bash
# onechip on a TPU slice of one or several hosts, by gcloud. Once: gcloud auth login; gcloud config set project ...
#
#   docs/slices/slice.sh create v6e-8 europe-west4-a     # a spot slice; "create" again after a preemption
#   docs/slices/slice.sh train 05_speedrun.py --preset day --mirror gs://your-bucket/onechip    # again: resumes
#   docs/slices/slice.sh delete
#
# Several hosts need a disk that all see, such as a Filestore share: docs/slices/slice.sh share 10.0.0.2:/runs
# mounts it on each as onechip/runs, which is where a run's folder is.
set -euo pipefail
NAME=${ONECHIP_SLICE:-onechip} KEPT=${XDG_STATE_HOME:-$HOME/.local/state}/onechip-slice
REPOSITORY=${ONECHIP_REPO:-https://github.com/onechip/onechip} REF=${ONECHIP_REF:-main}

zone() { cat "$KEPT" 2> /dev/null || { echo "no slice yet: $0 create v6e-8 europe-west4-a" >&2; exit 2; }; }

on_every_host() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$(zone)" --worker=all --command "$1"; }

case ${1:-} in
    create)
        mkdir -p "$(dirname "$KEPT")" && echo "${3:?a zone, such as europe-west4-a}" > "$KEPT"
        gcloud compute tpus queued-resources delete "$NAME" --zone "$3" --force --quiet 2> /dev/null || true
        gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$3" \
            --accelerator-type "${2:?a type, such as v6e-8 or v6e-16}" --runtime-version v2-alpha-tpuv6e --spot
        echo "waiting for it: gcloud compute tpus queued-resources describe $NAME --zone $3"
        until gcloud compute tpus queued-resources describe "$NAME" --zone "$3" --format 'value(state.state)' |
            grep -q ACTIVE; do sleep 30; done
        on_every_host "git clone -q $REPOSITORY onechip && cd onechip && git checkout -q $REF &&
            curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv sync --locked -q"
        ;;
    share)
        on_every_host "sudo apt-get install -qq -y nfs-common && mkdir -p onechip/runs &&
            sudo mount -t nfs ${2:?a share, such as 10.0.0.2:/runs} onechip/runs"
        ;;
    train)
        # The hosts of a TPU slice find one another: no --coordinator, no --hosts.
        : "${2:?a notebook, such as 05_speedrun.py}"
        on_every_host "cd onechip && ~/.local/bin/uv run --locked $(printf '%q ' "${@:2}")"
        ;;
    delete)
        gcloud compute tpus queued-resources delete "$NAME" --zone "$(zone)" --force --quiet
        ;;
    *)
        sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2
        ;;
esac
