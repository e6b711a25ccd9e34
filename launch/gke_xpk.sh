#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster that XPK made (github.com/AI-Hypercomputer/xpk), in an image of launch/Dockerfile
# (TARGET=tpu) that the cluster can pull:
#   CLUSTER=my-cluster WORKLOAD=mine IMAGE=REGISTRY/dspo_jax:tpu TYPE=v5litepod-16 SLICES=2 \
#       CONFIG=configs/sd15_dspo.py WORKDIR=/mnt/runs/mine launch/gke_xpk.sh --config.model=/mnt/MODEL_DIR ...
# /mnt was attached to the cluster by `xpk storage attach`; project and zone are those that gcloud is configured with.
# Interrupted here, the run goes on there: the last line follows it again; `xpk workload delete` ends it.
set -euo pipefail
: "${CLUSTER:?set CLUSTER}" "${WORKLOAD:?set WORKLOAD, a name for the job}" "${IMAGE:?set IMAGE}"
: "${TYPE:?set TYPE, for example v5litepod-16}"
: "${CONFIG:?set CONFIG, the recipe}" "${WORKDIR:?set WORKDIR, a folder that all hosts see}"

# XPK starts a job again that ended with 143, as train does when SIGTERM has made it save, or when a host was lost.
# The grace is what there is between an eviction's SIGTERM and the end.
xpk workload create --cluster="$CLUSTER" --workload="$WORKLOAD" --docker-image="$IMAGE" --tpu-type="$TYPE" \
    --num-slices="${SLICES:-1}" --max-restarts="${RESTARTS:-50}" --termination-grace-period-seconds=300 \
    --command="$(printf '%q ' env CONFIG="$CONFIG" WORKDIR="$WORKDIR" launch/train.sh "$@")"

pods="jobset.sigs.k8s.io/jobset-name=$WORKLOAD,batch.kubernetes.io/job-completion-index=0"
kubectl wait pod --for=condition=Ready --timeout=24h --selector="$pods"
kubectl logs --follow --prefix --selector="$pods"
