#!/usr/bin/env bash
# Everything that needs a GPU, in stages that each end within 9 minutes: benchmarks/gpu.sh OUT [STAGE...]
#
# Without names, the stages that have not ended well before, in the order of what is worth knowing first, and as many as
# CALL_SECONDS allow: the same command again goes on with the rest. After every stage OUT has two files, summary.txt and
# results.tar.gz (logs and figures), both made of the folder WORK, where a further call goes on.
# It exits with 1 if a stage failed; with 3 if one was skipped because it cannot run here, or left for another call.
#
#   PYTHON         the interpreter (python3)
#   WORK           the folder of logs, figures and caches (build/gpu)
#   WHEELS         a folder of wheels, of packages that are missing where nothing can be downloaded
#   STAGE_SECONDS  the longest that a stage may take (530)
#   CALL_SECONDS   the longest that this call may take (no limit)
#   TEST_WORKERS   processes of pytest (one a processor, 8 at most)
#   REHEARSE=1     no GPU: it is emulated (tests/emulated_device), without streams, graphs and speed, and sizes are small
set -uo pipefail
STAGES="build tests_cuda tests_triton tests_untrusted sanitizers speed_small speed_128k speed_1m speed_10k speed_big
speed_fl speed_compiled memory linear tests_paths"
# Seconds that a stage should have before it is begun, where there is a CALL_SECONDS.
declare -A least=([build]=150 [tests_cuda]=240 [tests_triton]=300 [tests_untrusted]=120 [sanitizers]=180 [tests_paths]=300)

out=${1:?usage: benchmarks/gpu.sh OUT [STAGE...]; stages: $STAGES}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
work=${WORK:-build/gpu}
mkdir -p "$work/done"
work=$(cd "$work" && pwd)
python=${PYTHON:-python3} rehearse=${REHEARSE:-} limit=${STAGE_SECONDS:-530} wheels=${WHEELS:-}
workers=${TEST_WORKERS:-$(($(nproc) > 8 ? 8 : $(nproc)))}
export work python rehearse wheels workers PYTHONUNBUFFERED=1 PYTHONPATH="$work/site:${PYTHONPATH:-}"
export ANL_KERNELS_CACHE="$work/cache" CUBLAS_WORKSPACE_CONFIG=:4096:8
[ -z "$rehearse" ] || export ANL_TEST_DEVICE=emulated TRITON_INTERPRET=1

# Python with the GPU, or with the emulated one.
py() { if [ -n "$rehearse" ]; then "$python" tests/emulated_device/rehearse.py "$@"; else "$python" "$@"; fi; }

# What can run here: `why`, by name, is empty for what can; asked once, and again after `build`.
declare -A why=()
look() {
    local line
    why=()
    while IFS= read -r line; do why[${line%%=*}]=${line#*=}; done < <(py benchmarks/gpu_facts.py 2> "$work/facts.err")
}
need() {
    [ ${#why[@]} -gt 0 ] || look
    if [ -z "${why[$1]+known}" ]; then echo "$python cannot import anl_kernels: $(tail -n 1 "$work/facts.err")"; return 1; fi
    [ -z "${why[$1]}" ] || { echo "${why[$1]}"; return 1; }
}

# need_STAGE says what a stage needs ("gpu" unless it is here), run_STAGE runs it, in a shell of its own.
need_build() { :; }
run_build() {
    { nvidia-smi 2>&1 || true; nvcc --version 2>&1 || true; "$python" -m pip list 2> /dev/null; date -u; } > "$work/info.txt"
    if [ -n "$wheels" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$work/site" "$wheels"/*.whl || return
    fi
    if [ -z "$rehearse" ]; then "$python" -m pip install --quiet --no-build-isolation --no-deps -e . || return; fi
    py -m anl_kernels info | tee -a "$work/info.txt"
    # The protocols between CTAs are verified on the way. Triton compiles a kernel for every loss and dtype: a few.
    local all=() few=(--loss ANL-CE --loss ANL-FL --dtype fp32 --dtype bf16) checked=0
    [ -z "$rehearse" ] || all=(--loss ANL-CE --dtype fp32 --here) few=("${all[@]}")
    py -m anl_kernels check --backend cuda "${all[@]}" || checked=$?
    py -m anl_kernels check --backend triton "${few[@]}" || checked=$?
    py benchmarks/gpu_calls.py --backend cuda --backend triton --seconds 60 ${rehearse:+--calls 6} && return $checked
}

# -v: names of what passed and failed are in the log at once, for a stage that is stopped.
pytest_gpu() {  # MARKS NAMES; in a rehearsal these names too
    local names=$2
    [ -z "$rehearse" ] || names="($2) and (${3:-$2})"
    "$python" -m pytest ${TIER:-} tests/test_*.py tests/backends tests/triton_kernels -m "$1" -k "$names" -n "$workers" -v -rfE --tb=short \
        --durations=15 -p no:cacheprovider --continue-on-collection-errors
}
AWKWARD="test_every_pair or test_few_long_rows or test_one_row or test_thousands or test_stretches or test_entropy_alone"
need_tests_cuda() { need cuda; }
run_tests_cuda() { pytest_gpu gpu "not triton"; }
need_tests_triton() { need triton; }
run_tests_triton() { pytest_gpu "gpu and not forced" "triton and not properties" \
    "test_gpu and small or test_reduce or test_terms or test_row_loss or test_factors or test_modules"; }
# Without the protocols between CTAs: the same work in launches of its own.
need_tests_untrusted() { need cuda; }
run_tests_untrusted() { ANL_KERNELS_TRUST=none pytest_gpu "gpu and not forced" "$AWKWARD or test_gpu" "not triton"; }
# The kernels that Triton is made to take, and all of its own choice: every loss, dtype and shape compiles another.
need_tests_paths() { need triton; }
run_tests_paths() { TIER=--thorough pytest_gpu gpu "triton" "test_one_row or test_certain"; }

sanitizer() { if [ -n "$rehearse" ]; then shift 4; "$@"; else compute-sanitizer "$@"; fi; }
# A kernel that writes where it should, and one that does not: the sanitizer must take the device, and see the second.
probe_sanitizer() {
    [ -z "$rehearse" ] || return 0
    command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer was not found"; return 1; }
    echo '__global__ void one(int* x) { x[threadIdx.x] = 1; }
    int main(int n, char**) { int* x; cudaMalloc(&x, 4); one<<<1, n>>>(x); return cudaDeviceSynchronize() != cudaSuccess; }' > "$work/probe.cu"
    "${CUDACXX:-nvcc}" -o "$work/probe" "$work/probe.cu" > "$work/probe.log" 2>&1 || { echo "nvcc: $(tail -n 1 "$work/probe.log")"; return 1; }
    compute-sanitizer --tool memcheck --error-exitcode 9 "$work/probe" > "$work/probe.log" 2>&1 ||
        { echo "compute-sanitizer refuses the device: $(grep -m 1 -i -E 'not supported|error' "$work/probe.log")"; return 1; }
    compute-sanitizer --tool memcheck --error-exitcode 9 "$work/probe" more > "$work/probe.log" 2>&1
    [ $? = 9 ] || { echo "compute-sanitizer does not see a write out of bounds"; return 1; }
}
need_sanitizers() { need cuda && probe_sanitizer; }
run_sanitizers() {
    local tool code=0
    for tool in memcheck racecheck; do
        echo "-- $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer --tool $tool --error-exitcode 9 \
            "$python" ${rehearse:+tests/emulated_device/rehearse.py} benchmarks/gpu_calls.py --seconds 150 ${rehearse:+--calls 3} || code=$?
    done
    return $code
}

bench() {
    local device=(--device cuda --seconds "${SECONDS_A_SHAPE:-4}")
    [ -z "$rehearse" ] || device=(--device cpu --seconds 0.01 --no-compile)
    py -m anl_kernels bench --json "$work/$1.json" "${@:2}" "${device[@]}" ${rehearse:+--shapes 16x10,8x100:bf16}
}
run_speed_small() { bench speed_small --no-compile --phase all --shapes 128x10,128x100,128x10:bf16,128x100:bf16,1x1000,1x1000000,1x1000000:bf16; }
run_speed_10k() { bench speed_10k --no-compile --shapes 26843545x10,2684354x100,268435x1000,26843x10000,26843545x10:bf16,2684354x100:bf16,268435x1000:bf16,26843x10000:bf16; }
run_speed_128k() { bench speed_128k --no-compile --shapes 2097x128000:bf16,2097x128000,8388x32000:bf16,8388x32000,5341x50257:bf16,5341x50257; }
run_speed_1m() { bench speed_1m --no-compile --shapes 268x1000000:bf16,268x1000000,1024x262144:bf16,1024x262144,1x21x512x512,1x21x512x512:bf16,1x150x512x512,1x150x512x512:bf16,16x21x512x512:bf16; }
run_speed_big() { bench speed_big --no-compile --shapes 16384x131072:bf16,2148x1000000; }
run_speed_fl() { bench speed_fl --loss anl_fl --no-compile --shapes 268435x1000:bf16,8388x32000:bf16,1024x262144:bf16,268x1000000:bf16,268x1000000; }
run_speed_compiled() { bench speed_compiled --shapes 128x100,268435x1000:bf16,8388x32000:bf16,2097x128000:bf16,268x1000000:bf16,1x21x512x512:bf16; }

run_memory() {
    local size=(--device cuda --rows 2048 --gib 24 --seconds 480)
    [ -z "$rehearse" ] || size=(--device cpu --rows 16 --classes 1000 --dtypes fp32 --gib 2 --seconds 10)
    "$python" benchmarks/memory.py --json "$work/memory.json" "${size[@]}"
}
run_linear() {
    local size=(--device cuda)
    [ -z "$rehearse" ] || size=(--device cpu --classes 1000 --width 16 --logits 64000 --rounds 1)
    py benchmarks/linear.py --json "$work/linear.json" "${size[@]}"
}

# ---- the stages

say() { echo "$*" | tee -a "$work/summary.txt"; }
hand_out() {  # at most two files, whatever a stage left
    cp "$work/summary.txt" "$out/summary.txt"
    tar -czf "$out/results.tar.gz" -C "$work" --exclude=./site --exclude=./probe .
}

run_stage() {
    local stage=$1 seconds=$2 begin=$SECONDS code
    echo "== $stage"
    { declare -f; declare -p AWKWARD; } > "$work/functions"
    # A shell of its own, so that `timeout` can end the whole stage.
    timeout --kill-after=10 "$seconds" bash -c 'set -uo pipefail; . "$work/functions"; "run_$1"' stage "$stage" 2>&1 | tee "$work/$stage.log"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || echo  # it may have been stopped within a line
    grep -E "^(FAILED|ERROR) |^[=]+ .*(passed|failed|error).* in " "$work/$stage.log" | cut -c1-200 | tail -n 60 >> "$work/summary.txt"
    if [ "$code" = 0 ]; then
        touch "$work/done/$stage"
        say "== $stage: ok, $((SECONDS - begin)) s"
    else
        failed+=("$stage")
        say "== $stage: FAILED with exit code $code$([ "$code" != 124 ] || echo " (stopped after $seconds s)"), $((SECONDS - begin)) s"
    fi
    [ "$stage" != build ] || why=()
}

failed=() skipped=() left=()
main() {
    local stage needs remaining chosen=${*:-$STAGES}
    for stage in $chosen; do
        if ! declare -F "run_$stage" > /dev/null; then
            echo "there is no stage '$stage'; stages:" $STAGES >&2
            exit 2
        fi
    done
    : > "$work/summary.txt"
    for stage in $chosen; do
        if [ $# = 0 ] && [ -e "$work/done/$stage" ]; then
            say "== $stage: done before"
            continue
        fi
        remaining=$((${CALL_SECONDS:-1000000} - SECONDS - 10))
        if [ "$remaining" -lt "${least[$stage]:-90}" ]; then
            left+=("$stage")
            continue
        fi
        needs=need_$stage
        declare -F "$needs" > /dev/null || needs="need gpu"
        $needs > "$work/why"
        if [ $? != 0 ]; then
            say "== $stage: skipped: $(head -n 1 "$work/why")"
            skipped+=("$stage")
            continue
        fi
        run_stage "$stage" $((limit < remaining ? limit : remaining))
        hand_out
    done
    say "failed: ${failed[*]:-none}; skipped: ${skipped[*]:-none}; left for another call: ${left[*]:-none}"
    [ -z "$rehearse" ] || say "a rehearsal: no GPU took part; what it has of its own (streams, graphs, speed) is not tested"
    hand_out
    [ ${#failed[@]} = 0 ] || exit 1
    [ $((${#skipped[@]} + ${#left[@]})) = 0 ] || exit 3
    exit 0
}
main "$@"  # read as a whole before it runs: who edits this file meanwhile harms nothing
