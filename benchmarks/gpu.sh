#!/usr/bin/env bash
# Everything that needs a GPU, in stages that each end within 8 minutes: benchmarks/gpu.sh OUT [STAGE...]
# Results and logs go to OUT. A stage that ended well leaves OUT/STAGE.done and is not run again; without names, all stages
# run in order. A stage that cannot run on this machine says why and is skipped, and the command then exits with 3; with 1
# if a stage failed. PYTHON names the interpreter (python3).
set -uo pipefail
STAGES="info build tests_cuda tests_triton memcheck racecheck speed_small speed_10k speed_128k speed_1m speed_big speed_fl memory linear"
out=${1:?usage: benchmarks/gpu.sh OUT [STAGE...]; stages: $STAGES}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${STAGE_SECONDS:-470}
export out python PYTHONUNBUFFERED=1

has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; }
need_gpu() { has_gpu || { echo "no GPU that PyTorch can use"; return 1; }; }
need_backend() {
    need_gpu || return 1
    "$python" -c 'import sys, anl_kernels as ak
found = {b.name: b for b in ak.backends()}
b = found.get(sys.argv[1])
if b is None or not b.available: sys.exit(print(b.reason if b else "there is no such backend") or 1)' "$1"
}
need_sanitizer() { need_backend cuda && { command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer was not found"; return 1; }; }; }

# can_STAGE prints why a stage cannot run here; run_STAGE runs it.
run_info() {
    { nvidia-smi 2>&1 || true; nvcc --version 2>&1 || true; "$python" -m anl_kernels info 2>&1 || true; "$python" -m pip list 2> /dev/null; date -u; } > "$out/info.txt"
    "$python" -c 'import torch; print("torch", torch.__version__, "GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else None)'
}
run_build() { "$python" -m pip install --quiet --no-build-isolation --no-deps -e . && "$python" -m anl_kernels info; }

pytest_gpu() { "$python" -m pytest -m gpu -n "${TEST_WORKERS:-6}" -q --junit-xml "$out/$1.xml" "${@:2}"; }
can_tests_cuda() { need_backend cuda; }
run_tests_cuda() { pytest_gpu tests_cuda -k "not triton" && "$python" -m anl_kernels check --backend cuda; }
can_tests_triton() { need_backend triton; }
run_tests_triton() { pytest_gpu tests_triton -k triton && "$python" -m anl_kernels check --backend triton; }

sanitized() { PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "$python" benchmarks/gpu_calls.py; }
can_memcheck() { need_sanitizer; }
run_memcheck() { sanitized memcheck; }
can_racecheck() { need_sanitizer; }
run_racecheck() { sanitized racecheck; }

bench() { "$python" -m anl_kernels bench --device cuda --seconds "${SECONDS_A_SHAPE:-6}" --json "$out/$1.json" "${@:2}"; }
for stage in small 10k 128k 1m big fl; do eval "can_speed_$stage() { need_gpu; }"; done
run_speed_small() { bench speed_small --phase all --shapes 128x10,128x100,128x10:bf16,128x100:bf16,1x1000,1x1000000,1x1000000:bf16; }
run_speed_10k() { bench speed_10k --shapes 26843545x10,2684354x100,268435x1000,26843x10000,26843545x10:bf16,2684354x100:bf16,268435x1000:bf16,26843x10000:bf16; }
run_speed_128k() { bench speed_128k --shapes 8388x32000,5341x50257,2097x128000,8388x32000:bf16,5341x50257:bf16,2097x128000:bf16; }
run_speed_1m() { bench speed_1m --shapes 1024x262144,268x1000000,1024x262144:bf16,268x1000000:bf16,1x21x512x512,1x21x512x512:bf16,1x150x512x512,1x150x512x512:bf16,16x21x512x512:bf16; }
run_speed_big() { bench speed_big --shapes 16384x131072:bf16,2148x1000000; }
run_speed_fl() { bench speed_fl --loss anl_fl --no-compile --shapes 268435x1000:bf16,8388x32000:bf16,1024x262144:bf16,268x1000000:bf16,268x1000000; }

can_memory() { need_gpu; }
run_memory() { "$python" benchmarks/memory.py --device cuda --rows 2048 --gib 24 --json "$out/memory.json"; }
can_linear() { need_gpu; }
run_linear() { "$python" benchmarks/linear.py --device cuda --json "$out/linear.json"; }

failed=() skipped=()
for stage in ${@:-$STAGES}; do
    if ! declare -F "run_$stage" > /dev/null; then
        echo "there is no stage '$stage'; stages: $STAGES" >&2
        exit 2
    fi
    if [ -e "$out/$stage.done" ]; then
        echo "== $stage: done before"
        continue
    fi
    if declare -F "can_$stage" > /dev/null && ! why=$("can_$stage"); then
        echo "== $stage: skipped: $why"
        skipped+=("$stage")
        continue
    fi
    echo "== $stage"
    begin=$SECONDS
    # A shell of its own, so that `timeout` can end the whole stage.
    declare -f > "$out/.functions"
    timeout --kill-after=10 "$limit" bash -c 'set -uo pipefail; . "$out/.functions"; "run_$1"' stage "$stage" 2>&1 | tee "$out/$stage.log"
    code=${PIPESTATUS[0]}
    if [ "$code" = 0 ]; then
        touch "$out/$stage.done"
        echo "== $stage: ok, $((SECONDS - begin)) s"
    else
        failed+=("$stage")
        echo "== $stage: FAILED with exit code $code ($([ "$code" = 124 ] && echo "stopped after $limit s")), $((SECONDS - begin)) s"
    fi
done
echo "failed: ${failed[*]:-none}; skipped: ${skipped[*]:-none}"
[ ${#failed[@]} = 0 ] || exit 1
[ ${#skipped[@]} = 0 ] || exit 3
