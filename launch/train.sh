#!/usr/bin/env bash
# One process of a run, in the environment that all launchers beside this file give it; its arguments go to train:
#   CONFIG=configs/sd15_dspo.py WORKDIR=runs/mine launch/train.sh --config.model=MODEL_DIR --config.data.path=DATA_DIR
# A variable that is set already stays as it is.
set -euo pipefail
: "${CONFIG:?set CONFIG, the recipe, for example configs/sd15_dspo.py}"
: "${WORKDIR:?set WORKDIR, the folder of the run, on a disk that all its processes see}"

# Compiling a step takes minutes at full size; a run that is started again finds it here. Beside the workdir, because
# that disk outlives a preempted machine, and is seen by all processes, of which only the first writes.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(dirname "$WORKDIR")/.jax_cache}"

if command -v nvidia-smi > /dev/null; then
    # JAX takes 75 % of a GPU's memory when it starts; nothing else is to run there, and what is left is for CUDA's
    # libraries, which do not ask JAX.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
    # Gradients are summed across devices while the backward pass still runs, where XLA would sum and then go on.
    export XLA_FLAGS="${XLA_FLAGS---xla_gpu_enable_latency_hiding_scheduler=true}"
fi
# On a TPU with SparseCores (v5p, v6e) these sum gradients and gather parameters while the rest computes; a v5e has
# none, and sums as without. Libtpu alone reads it.
offload=--xla_tpu_enable_sparse_core_collective_offload
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS-${offload}_all_reduce=true ${offload}_all_gather=true}"

exec python -m dspo_jax.train --config "$CONFIG" --workdir "$WORKDIR" "$@"
