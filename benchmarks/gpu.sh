#!/usr/bin/env bash
# Everything that one GPU can show, in one command and under ten minutes, without a network.
#
#   benchmarks/gpu.sh [FOLDER]                 # runs/gpu by default
#   TINY=1 benchmarks/gpu.sh [FOLDER]          # the same parts at the emoji model's size, to see that they run
#
# Needs JAX and torch that see the GPU (the first of several is used), and the packages of the `test` extra; PYTHON
# names the interpreter. FOLDER gets a .log of every part, the .json of those that have numbers, and table.md. A part
# that is done is not run again, and one that would begin after SECONDS_IN_ALL is left out: the same command then goes
# on from there. PAIRS_SD15 and PAIRS_SDXL are the pairs of a step.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

out=${1:-runs/gpu}
python=${PYTHON:-python}
tiny=${TINY:-}
limit=${SECONDS_IN_ALL:-570}
sd15=${PAIRS_SD15:-8}
sdxl=${PAIRS_SDXL:-2}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ -z $tiny ]]; then
  if ! command -v nvidia-smi >/dev/null; then
    echo "gpu.sh: no GPU here (no nvidia-smi); TINY=1 runs its parts on a CPU" >&2
    exit 2
  fi
  # One GPU for both, and no fallback to the CPU, which counts FLOPs.
  export JAX_PLATFORMS=cuda,cpu
  first=${CUDA_VISIBLE_DEVICES:-0}
  export CUDA_VISIBLE_DEVICES=${first%%,*}
fi
# torch's processes take their turn between JAX's, but the tests hold both.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

# part NAME COMMAND...: runs `python COMMAND...`, unless it has been run or time is up. "@" becomes its JSON file.
part() {
  local name=$1 left=$((limit - SECONDS)) begun=$SECONDS
  shift
  if [[ -e $out/$name.done ]]; then
    echo "$name: has been run"
    return
  fi
  if ((left <= 0)); then
    echo "$name: left out, $limit seconds are over"
    return
  fi
  if timeout "$left" "$python" "${@//@/$out/$name.json}" >"$out/$name.log" 2>&1; then
    touch "$out/$name.done"
    echo "$name: $((SECONDS - begun)) s"
  else
    echo "$name: failed with status $? after $((SECONDS - begun)) s: $(tail -n 1 "$out/$name.log")"
  fi
}

# compare NAME WAYS FLAGS...: the step here and in torch, as ways of --torch.
compare() {
  local name=$1 ways=$2
  shift 2
  part "$name" -m benchmarks.compare "$@" --torch="$ways" --rounds=1 --json=@
}

if [[ -n $tiny ]]; then
  steps=1 pairs=64 rows=40
  sample=(--batches=1 --batch_size=2 --steps=2)
  small=(--config.model=examples/emoji/model --config.batch_size=2 --resolution=16 --config.accumulation=1)
  small+=(--config.compute_dtype=float32 --config.remat=none)
  sd15_flags=("${small[@]}")
  sdxl_flags=("${small[@]}")
else
  steps=10 pairs=4000 rows=1000
  sample=(--batches=2 --batch_size=64)
  sd15_flags=(--published=sd15 "--config.batch_size=$sd15" --config.accumulation=1)
  sdxl_flags=(--published=sdxl "--config.batch_size=$sdxl" --config.accumulation=1 --config.remat=blocks)
fi
lora=(--config.lora.rank=8 --config.optimizer.name=adamw)

ways=channels_last,channels_last+online_vae
[[ -n $tiny ]] || ways+=,channels_last+compile
compare sd15 "$ways" --config=configs/sd15_dspo.py --steps=$steps "${sd15_flags[@]}"
compare sdxl "channels_last" --config=configs/sdxl_dspo.py --steps=$steps "${sdxl_flags[@]}"
compare sd15_lora "channels_last" --config=configs/sd15_dspo.py --steps=$steps "${sd15_flags[@]}" "${lora[@]}"
compare sdxl_lora "channels_last" --config=configs/sdxl_dspo.py --steps=$steps "${sdxl_flags[@]}" "${lora[@]}"
[[ -n $tiny ]] || part attention -m benchmarks.attention
part input_pipeline -m benchmarks.input_pipeline --folder="$out/pairs" --pairs=$pairs --json=@
part sample -m benchmarks.sample "${sample[@]}"
part encode -m benchmarks.encode --out="$out/encode" --rows=$rows
[[ -n $tiny ]] || part gpu_tests -m pytest -q -m "" -k "on_a_gpu" tests
[[ -n $tiny ]] || part layers -m benchmarks.layers

"$python" -m benchmarks.measuring "$out" >"$out/table.md" && cat "$out/table.md"
