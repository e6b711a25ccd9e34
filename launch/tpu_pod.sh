#!/usr/bin/env bash
# A run on a TPU slice of one or many hosts, which is made if it is not there, and made again when it was preempted:
#   TPU=my-slice ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite SPOT=1 \
#       SETUP='mountpoint -q /mnt || sudo mount -o nconnect=8 SERVER:/runs /mnt' \
#       CONFIG=configs/sd15_dspo.py WORKDIR=/mnt/runs/mine launch/tpu_pod.sh --config.model=/mnt/MODEL_DIR ...
# SETUP runs on every host before the run starts there. Interrupted here, the run goes on there; the same command
# follows it again.
# The slice is kept: gcloud compute tpus tpu-vm delete "$TPU" --zone="$ZONE"
set -euo pipefail
: "${TPU:?set TPU, a name for the slice}" "${ZONE:?set ZONE}" "${TYPE:?set TYPE, for example v5litepod-16}"
: "${RUNTIME:?set RUNTIME, the software version for this type, for example v2-alpha-tpuv5-lite}"
: "${CONFIG:?set CONFIG, the recipe}" "${WORKDIR:?set WORKDIR, a folder that all hosts see}"
cd "$(dirname "$0")/.."

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
archive=$(mktemp -d)/dspo_jax.tgz
trap 'rm -r "${archive%/*}"' EXIT
git ls-files -z | tar --null --files-from=- -czf "$archive" # what is tracked, as it is here
prepare() {
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --zone="$ZONE" --worker=all || return
    tpu ssh --worker=all --command="set -e
        ${SETUP:-:}
        mkdir -p dspo_jax && tar -xzf dspo_jax.tgz -C dspo_jax && cd dspo_jax
        python3 -m pip install --quiet --user uv && export PATH=\$HOME/.local/bin:\$PATH
        [ -d .venv ] || uv venv --quiet --python 3.12 # the images of TPU hosts have an older one
        uv pip install --quiet -c constraints.txt -e '.[tpu]'"
}

train=$(printf '%q ' env CONFIG="$CONFIG" WORKDIR="$WORKDIR" launch/train.sh "$@")
run=$(printf '%q' "cd dspo_jax && . .venv/bin/activate; $train; echo \$? > ~/train.status")
running="pgrep -f '[d]spo_jax.train' > /dev/null"
# Detached from this connection; its status file says that it has ended, and how.
start="$running || { rm -f train.status; nohup setsid bash -c $run > train.log 2>&1 < /dev/null & sleep 1; }"
follow="tail -n +1 -F train.log & until [ -f train.status ]; do sleep 5; done; sleep 1; kill \$!"

for ((attempt = 1; attempt <= ${ATTEMPTS:-50}; attempt++)); do
    state=$(tpu describe --format='value(state)' 2> /dev/null || true)
    case $state in
        READY) ;;
        '') # or there is no room at the moment
            tpu create --accelerator-type="$TYPE" --version="$RUNTIME" ${SPOT:+--spot} || sleep "${PAUSE:-60}"
            continue
            ;;
        PREEMPTED | TERMINATED | STOPPED | FAILED) tpu delete --quiet; continue ;;
        *) echo "$TPU: $state"; sleep "${PAUSE:-60}"; continue ;;
    esac
    if ! tpu ssh --worker=0 --command="$running" && ! { prepare && tpu ssh --worker=all --command="$start"; }; then
        echo "$TPU: not started in attempt $attempt"; sleep "${PAUSE:-60}"; continue
    fi
    tpu ssh --worker=0 --command="$follow" || true # what ends it is not what train says
    status=$(tpu ssh --worker=0 --command='cat train.status' || true)
    case $status in # 143: asked to stop, and saved; nothing: the host is gone
        '' | 143) echo "$TPU: lost or preempted in attempt $attempt"; sleep "${PAUSE:-60}" ;;
        *) exit "$status" ;;
    esac
done
echo "error: $TPU: given up after ${ATTEMPTS:-50} attempts" >&2
exit 1
