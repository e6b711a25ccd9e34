#!/usr/bin/env bash
# A run on one machine, on all its GPUs:
#   CONFIG=configs/sd15_dspo.py WORKDIR=runs/mine launch/gpu.sh --config.model=MODEL_DIR --config.data.path=DATA_DIR
# One process for all GPUs is enough. PROCESSES=N starts N with one GPU each (CUDA_VISIBLE_DEVICES names them), which
# find one another over loopback; on a CPU it tries out what several machines would do.
# Exit status: that of train, or of a process that failed; 143 is "stopped and saved, the same command resumes".
set -euo pipefail
here=$(dirname "$0")
processes=${PROCESSES:-1}
((processes > 1)) || exec "$here/train.sh" "$@"

port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((processes - 1)))}"
pids=()
for ((i = 0; i < processes; i++)); do
    CUDA_VISIBLE_DEVICES=${gpus[i]:?CUDA_VISIBLE_DEVICES names fewer GPUs than PROCESSES=$processes} \
        "$here/train.sh" "$@" --coordinator_address="localhost:$port" --num_processes="$processes" --process_id="$i" &
    pids+=($!)
done

# Any of them that is asked to stop makes all save the same step.
trap 'asked=1; kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT

status=0
for pid in "${pids[@]}"; do
    asked=1
    while ((asked)); do # a signal ends `wait`, but not yet the process
        asked=0 code=0
        wait "$pid" || code=$?
    done
    ((code == 0)) || status=$code
done
exit "$status"
