#!/usr/bin/env bash
# From a model and pairs to win rates: convert, encode, train, export, evaluate, all into WORKDIR:
#   MODEL=HUB_ID_OR_FOLDER ENCODE='configs/encode/folder.py --config.source.path=DIR' \
#   EVALUATE='--prompts=prompts.txt --rewards=pickscore' \
#       CONFIG=configs/sd15_dspo.py WORKDIR=runs/mine launch/pipeline.sh --config.batch_size=64
# What comes after the script goes to train, by launch/gpu.sh. Stopped anywhere, the same command goes on where it was.
# MODEL_DIR and PAIRS name a converted model and a dataset elsewhere, to share them between runs.
set -euo pipefail
: "${CONFIG:?set CONFIG, the recipe}" "${WORKDIR:?set WORKDIR, the folder of the run}"
: "${ENCODE:?set ENCODE, a recipe of configs/encode and its overrides}"
: "${EVALUATE:?set EVALUATE, at least --prompts and --rewards}"
model=${MODEL_DIR:-$WORKDIR/model} pairs=${PAIRS:-$WORKDIR/pairs} exported=$WORKDIR/export
here=$(dirname "$0")
read -ra encode <<< "$ENCODE"
read -ra evaluate <<< "$EVALUATE"
stage() { echo "pipeline: $*" >&2; }

# A model that is written appears under its name when it is complete.
if [ ! -e "$model" ]; then
    stage "convert: $model"
    python -m dspo_jax.convert import --model="${MODEL:?set MODEL, what to start from}" --out="$model"
fi

stage "encode: $pairs" # verifies what is there, and writes what is not
python -m dspo_jax.encode --config "${encode[@]}" --config.model="$model" --out="$pairs"

if [ ! -e "$exported" ]; then
    stage "train: $WORKDIR" # resumes; a run that was asked to stop ends the pipeline, with train's status 143
    "$here/gpu.sh" --config.model="$model" --config.data.path="$pairs" "$@"
    stage "export: $exported"
    python -m dspo_jax.convert export --run="$WORKDIR" --out="$exported"
fi

stage "evaluate: $WORKDIR/evaluation" # keeps what was drawn and scored
python -m dspo_jax.evaluate --base="$model" --model="aligned=$exported" "${evaluate[@]}" --out="$WORKDIR/evaluation"
