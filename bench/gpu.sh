#!/usr/bin/env bash
# Checks and times olmfast on the GPU at hand, without a network, in less than eight minutes.
#
#   bench/gpu.sh              everything, the most important first
#   bench/gpu.sh PART ...     some of: self-check tests batched demo rates kernels swap large streaming
#                             (streaming, by name only: a model of which `max_vram` holds a part)
#
# Each part has a limit of its own, and each figure is shown as soon as it is there. All of it also goes to the file
# OLMFAST_GPU_RESULTS (gpu-results.txt), with the card, the driver, the versions, the commit and the commands.
# OLMFAST_BEFORE=FOLDER: `rates` also measures the older olmfast in that folder, first. PYTHON: the interpreter.
set -u -o pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; fi
results=${OLMFAST_GPU_RESULTS:-gpu-results.txt}
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
failed=()
# What all of it may take. Parts that are asked for by name have their own limits only.
total=${OLMFAST_GPU_SECONDS:-475}

say() { printf '%s\n' "$*" | tee -a "$results"; }

part() {  # name, limit in seconds, command
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  if [ -n "$whole" ] && [ "$limit" -gt $((total - SECONDS)) ]; then limit=$((total - SECONDS)); fi
  if [ "$limit" -lt 10 ]; then say "== $name: left out, $SECONDS s have passed"; return; fi
  say "" "== $name: $*"
  # Interrupted, pytest still tells what has failed until then. What it leaves behind holds nobody up.
  timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" > >(tee -a "$results") 2>&1
  status=$?
  sleep 0.5
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then say "== $name: stopped at its limit of $limit s"; fi
  if [ "$status" != 0 ]; then failed+=("$name"); fi
  say "== $name: exit code $status, $((SECONDS - began)) s"
}

run() {
  case $1 in
    self-check) part self-check 40 "$PYTHON" -m olmfast.kernels ;;
    tests) part tests 150 "$PYTHON" -m pytest tests/kernels -q -rf -p no:cacheprovider $parallel \
      --ignore tests/kernels/test_compile.py --ignore tests/kernels/test_dispatch.py ;;
    batched) part batched 90 "$PYTHON" -m pytest tests/test_decoding.py tests/test_batched.py tests/test_fusing.py \
      tests/test_streaming.py -q -rf -p no:cacheprovider -k "not every_family_unit" $parallel ;;  # that is a CPU's
    demo) part demo 90 "$PYTHON" -c 'import sys; from olmfast.cli import main; sys.exit(main())' \
      run examples/demo/merge.yaml --overwrite ;;
    rates)
      if [ -n "${OLMFAST_BEFORE:-}" ]; then
        PYTHONPATH=$OLMFAST_BEFORE part "rates before" 60 "$PYTHON" bench/rates.py
      fi
      part rates 60 "$PYTHON" bench/rates.py ;;
    kernels) part kernels 90 "$PYTHON" -m pytest bench/test_kernels.py --benchmark-only -q -p no:cacheprovider ;;
    swap) part swap 45 "$PYTHON" -m pytest bench/test_shards.py -k device --benchmark-only -q -p no:cacheprovider ;;
    large)
      OLMFAST_BENCH_ALL=1 OLMFAST_BENCH_SECONDS=${OLMFAST_BENCH_SECONDS:-200} part large 240 \
        "$PYTHON" -m pytest bench/test_large.py -k candidates --benchmark-only -q -p no:cacheprovider ;;
    streaming)
      OLMFAST_BENCH_ALL=1 OLMFAST_BENCH_SECONDS=${OLMFAST_BENCH_SECONDS:-400} part streaming 460 \
        "$PYTHON" -m pytest bench/test_large.py -k small_card --benchmark-only -q -p no:cacheprovider ;;
    *) echo "gpu.sh: $1: not a part" >&2; exit 2 ;;
  esac
}

nvidia-smi > /dev/null 2>&1 || { echo "gpu.sh: no GPU here" >&2; exit 2; }
parallel=$("$PYTHON" -c 'import os, xdist; print("-n", min(14, os.cpu_count()))' 2> /dev/null || true)
: > "$results"
say "$(date -u +%F) $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -1)"
say "$("$PYTHON" -c 'import sys, torch, triton, transformers as t
print("Python", sys.version.split()[0] + ", torch", torch.__version__ + ", triton", triton.__version__ + ", transformers", t.__version__)')"
say "commit ${OLMFAST_COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}; command: bench/gpu.sh $*"
whole=
if [ $# = 0 ]; then
  whole=yes
  export OLMFAST_BENCH_SECONDS=${OLMFAST_BENCH_SECONDS:-150}
  set -- self-check tests batched demo rates swap large kernels
fi
for name in "$@"; do run "$name"; done
say "" "results are in $results"
[ ${#failed[@]} = 0 ] || { say "failed: ${failed[*]}"; exit 1; }
