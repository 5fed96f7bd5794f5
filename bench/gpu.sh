#!/usr/bin/env bash
# Everything worth measuring on one H100 or H200, with random weights and no download.
#
#   bash bench/gpu.sh OUT           # 7B in bfloat16; parts are done one by one, each has its own time limit
#   bash bench/gpu.sh OUT decode    # one part
#   SIZE=tiny bash bench/gpu.sh OUT # the same commands at tiny size, on a CPU as well
#
# jax, torch and transformers must be installed. OUT gets a JSON file and a log of each part.
set -uo pipefail
out=${1:?a folder for the results}
only=${2:-}
size=${SIZE:-7b}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
weights=${WEIGHTS:-$out/weights-$size}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch is on the same GPU
if [ "$size" = tiny ]; then
  rows=2 length=40 batches="1 2" many=2 tokens=4 repeats=1
else
  rows=8 length=2048 batches="1 8" many=64 tokens=256 repeats=5
fi
failed=0

part() { # NAME SECONDS WORDS...: one benchmark
  local name=$1 limit=$2
  shift 2
  [ -z "$only" ] || [ "$only" = "$name" ] || return 0
  echo "== $name: python -m bench $*"
  timeout "$limit" python -m bench "$@" --repeats "$repeats" --out "$out/$name.json" 2>&1 | tee "$out/$name.log" ||
    { echo "$name failed"; failed=$((failed + 1)); }
}

infer="--size $size --folder $weights --tokens $tokens"
part machine 120 machine
part decode 300 decode $infer --batch $batches
part decode_many 240 decode $infer --batch $many --systems llava_jax
part decode_int8 180 decode $infer --batch 1 --systems llava_jax --quantize int8
part decode_nf4 180 decode $infer --batch 1 --systems llava_jax --quantize nf4
part prefill 240 prefill $infer --batch 1
part stage1 240 train --size "$size" --train projector --rows "$rows" --length "$length"
part stage2_lora 300 train --size "$size" --train lora --rows "$rows" --length "$length" --systems llava_jax
part stage2 300 train --size "$size" --train full --rows "$rows" --length "$length" --systems llava_jax
exit "$failed"
