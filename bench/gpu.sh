#!/usr/bin/env bash
# Everything worth measuring on one H100 or H200, with random weights and no download, within 15 minutes.
#
#   bash bench/gpu.sh OUT           # 7B in bfloat16, part by part, and a table beside the limits
#   bash bench/gpu.sh OUT decode    # one part
#   SIZE=tiny bash bench/gpu.sh OUT # the same commands at tiny size, on a CPU as well
#   REPEATS=5 bash bench/gpu.sh OUT # more turns than 3
#
# jax, torch and transformers must be installed. OUT gets a JSON file and a log of each part, and what a
# second run would compile again. A part ends at its own limit, all of them after BUDGET seconds (840); a
# part whose JSON is there is not measured again, so that the same command goes on where one was cut off.
set -uo pipefail
out=${1:?a folder for the results}
only=${2:-}
size=${SIZE:-7b}
budget=${BUDGET:-840}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
weights=${WEIGHTS:-$out/weights-$size}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch is on the same GPU
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
if [ "$size" = tiny ]; then
  rows=2 length=40 layers=2 many=2 tokens=4 text=8 requests=4 repeats=1
else
  rows=8 length=2048 layers=16 many=64 tokens=100 text=60 requests=128 repeats=${REPEATS:-3}
fi
failed=0

part() { # NAME SECONDS WORDS...: one benchmark
  local name=$1 limit=$2
  shift 2
  [ -z "$only" ] || [ "$only" = "$name" ] || return 0
  [ ! -s "$out/$name.json" ] || { echo "== $name: is there"; return 0; }
  local left=$((budget - SECONDS))
  [ "$left" -ge 20 ] || { echo "== $name: no time is left"; failed=$((failed + 1)); return 0; }
  echo "== $name: python -m bench $*"
  timeout "$((limit < left ? limit : left))" python3 -m bench "$@" --out "$out/$name.json" 2>&1 |
    tee "$out/$name.log" || { echo "$name failed"; failed=$((failed + 1)); }
}

infer="--size $size --folder $weights --repeats $repeats --text $text --tokens $tokens"
ours="--systems llava_jax"
train="--size $size --repeats $repeats --rows $rows --length $length"
part decode 150 decode --then prefill $infer --batch 1
part stage1 120 train $train --train projector
part decode_many 200 decode --then requests $infer --batch "$many" --requests "$requests" $ours
part decode_int8 90 decode $infer --batch 1 $ours --quantize int8
part decode_nf4 90 decode $infer --batch 1 $ours --quantize nf4
# AdamW on all of 7B takes 108 GB: half of the layers do the same work for each weight and token.
part stage2 120 train $train --train full --layers "$layers" $ours
part machine 60 machine
part stage2_lora 150 train $train --train lora
part prefill_256 90 prefill $infer --batch 1 $ours --chunk 256
part stage1_kept 120 train $train --train projector $ours --config.remat=none
python3 -m bench.gpu "$out"
exit "$failed"
