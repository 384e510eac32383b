#!/usr/bin/env bash
# Checks and times blockdiag on a machine with an NVIDIA GPU, without a network: scripts/gpu_check.sh OUT_DIR PART
#
#   first              up to 270 s: which libraries are correct, which should be the default, the tests by each library,
#                      and compute-sanitizer on our own kernels
#   second [FAILURES]  up to 320 s: the tests that failed in first, from its failures.txt, and the benchmark that the
#                      goals need
#   time SUITE...      up to 440 s: further suites, named as for python -m benchmarks --suites
#
# Uses the module in build/gpu if it matches (scripts/gpu_build.sh), or builds one, which takes a minute of the first
# part. Needs a python3 with a CUDA build of torch, pytest, hypothesis and tqdm; to build also nvcc, ninja, pybind11 and
# setuptools. A step is killed at its limit, and a step that fails does not stop the others. All of them write as they
# go. Leaves at most 8 files in OUT_DIR:
#
#   report.txt         build, versions, devices, driver     subset.log, tests.log   as printed
#   decision.txt       the winner of each problem, and the rule's verdict; from decision.json
#   failures.txt       every failed test with its library and traceback
#   timing.log         the tables       goals.txt   which goals are met, for each variant of ours; from the other JSON files
#
# Exits with 0 only if all steps passed; a missed goal is not a failure.
set -uo pipefail
. "$(dirname "$0")/gpu_common.sh"

usage() {
  sed -n '2,8s/^# //p' "$0" >&2
  exit 2
}
[ $# -ge 2 ] || usage
out=$1 part=$2
shift 2
case $part:$# in
  first:0) limit=270 ;;
  second:[01]) limit=320 ;;
  time:[1-9]*) limit=440 ;;
  *) usage ;;
esac
failures_of_first= # read before anything is removed, as it may be in OUT_DIR
if [ "$part:$#" = second:1 ]; then
  [ -r "$1" ] || usage
  failures_of_first=$(grep '^FAILED ' "$1" || true)
fi
mkdir -p "$out"
out=$(realpath "$out")
rm -f "$out"/*.log "$out"/*.txt "$out"/*.json

BLOCKDIAG_COMMIT=${BLOCKDIAG_COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || true)}
if [ -z "$BLOCKDIAG_COMMIT" ]; then # a copy without its history
  BLOCKDIAG_COMMIT=$(cat "$prebuilt/commit" 2>/dev/null || echo unknown)
  [ "$(cat "$prebuilt/tree" 2>/dev/null)" = "$(tree_digest)" ] || BLOCKDIAG_COMMIT+=-modified
fi
export BLOCKDIAG_COMMIT FAIL_WITHOUT_CUDA=1 FAIL_WITHOUT_CUDA_BUILD=1 PYTHONUNBUFFERED=1
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
# The user's own settings must not choose for the tests.
unset BLOCKDIAG_CUDA_GEMM BLOCKDIAG_TUNE

work=${TMPDIR:-/tmp}/blockdiag-gpu-check-$UID
mkdir -p "$work"
find "$work" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
copy_tree "$work"
cd "$work" || exit 1
left() { echo $((limit - SECONDS > 10 ? limit - SECONDS - 5 : 5)); }
at_most() { echo $(($(left) < $1 ? $(left) : $1)); }
failed=()

step() { # LIMIT LOG NAME COMMAND...: shows the end of its output
  printf '== %s (%d s in)\n' "$3" "$SECONDS"
  local from=0
  [ ! -e "$out/$2" ] || from=$(wc -l <"$out/$2")
  echo "== $3: ${*:4}" >>"$out/$2"
  timeout --signal=INT --kill-after=5 "$1" "${@:4}" >>"$out/$2" 2>&1 || failed+=("$3: status $?")
  tail -n "+$((from + 2))" "$out/$2" | tail -n 12 | cut -c 1-200
}

beside() { # LIMIT LOG NAME COMMAND...: runs in the background; join waits for all of them
  rm -f "$work/status-$3"
  (
    timeout --signal=INT --kill-after=5 "$1" "${@:4}" 2>&1 | sed -u "s/^/$3: /" >>"$out/$2"
    echo "${PIPESTATUS[0]}" >"$work/status-$3"
  ) &
}
join() { # LOG NAME...: shows the last line of each
  wait
  local name status
  for name in "${@:2}"; do
    status=$(cat "$work/status-$name" 2>/dev/null || echo unknown)
    [ "$status" = 0 ] || failed+=("$name: status $status")
    grep "^$name: " "$out/$1" | tail -n 1 | cut -c 1-200
  done
}

# ---- The module, and where it runs

works() { python3 -c "import blockdiag; exit(blockdiag.build_info()['cuda'] == 'none')"; }
{
  echo "== module ($BLOCKDIAG_COMMIT)"
  if [ "$(cat "$prebuilt/digest" 2>/dev/null)" = "$(compiled_digest)" ] && cp "$prebuilt"/_C*.so blockdiag && works; then
    echo "taken from build/gpu"
  else
    rm -f blockdiag/_C*
    echo "built here"
    FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} timeout 100 \
      python3 setup.py -q build_ext --inplace && works || echo "FAILED"
  fi 2>&1
  python3 -m blockdiag
  nvidia-smi
} 2>&1 | tee "$out/report.txt" | tail -n 60
works 2>/dev/null || exit 1

tests() { # LIMIT LIBRARY LOG PROCESSES ARGUMENT...: skips what would start less than 10 s before the limit
  local processes=()
  ! python3 -c "import xdist" 2>/dev/null || processes=(-n "$4" --dist worksteal)
  DEADLINE=$((EPOCHSECONDS + $1 - 10)) FAILURES=$out/failures.txt BLOCKDIAG_CUDA_GEMM=$2 \
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
    beside "$1" "$3" "$2" python3 -m pytest -q -rs -p no:cacheprovider --continue-on-collection-errors -m cuda \
    "${processes[@]}" "${@:5}"
}

benchmark() { # SECONDS NAME ARGUMENT...: INT is Ctrl-C, and keeps what was measured by then
  local minutes
  minutes=$(python3 -c "print(max($1 - 15, 1) / 60)") # leaves time to start, and for a case or two
  step "$1" timing.log "$2" \
    python3 -m benchmarks --device cuda --rounds 7 --max-minutes "$minutes" --output "$out/$2.json" "${@:3}"
  [ -s "$out/$2.json" ] || rm -f "$out/$2.json" # killed before it wrote anything
}

libraries=(cublas cublaslt fused small_blocks)

sanitize() { # LIMIT TOOL
  # torch's cache would hide out-of-bounds reads, as tensors lie side by side in it. Calls by which torch probes the
  # driver fail as they should. cuBLAS's kernels are NVIDIA's to check.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 beside "$1" tests.log "$2" "$sanitizer" --tool "$2" --error-exitcode 9 \
    --report-api-errors no --target-processes application-only --launch-timeout 60 --kernel-name kns=blockdiag \
    python3 tests/gpu_subset.py small_blocks fused
}

first() {
  local library tool folder sanitizer subset=(small_blocks cublas cublaslt fused tuned) tools=()
  for library in "${subset[@]}"; do
    beside 45 subset.log "$library" python3 tests/gpu_subset.py "$library"
  done
  join subset.log "${subset[@]}"
  # A library that is wrong, or loses the device, would spoil the timing of all others.
  right() { [ "$(cat "$work/status-$1")" = 0 ]; }
  local wrong=(ours) # the default, which is one of the others
  right cublas || wrong+=(ours_cublas)
  right cublaslt || wrong+=(ours_lt)
  right fused || wrong+=(ours_fused)
  right tuned || wrong+=(ours_tuned)
  right small_blocks || wrong+=(ours_small ours_unsplit)
  benchmark "$(at_most 110)" decision --modes graph --exclude "${wrong[@]}" --suites \
    decision:amp-float16 decision_large:bfloat16,amp-bfloat16 decision_split:amp-float16 decision:float16
  mv "$out/timing.log" "$out/decision.txt"
  python3 -m benchmarks --decide "$out/decision.json" >>"$out/decision.txt" 2>&1
  sed -n '/^of  /,$p' "$out/decision.txt"

  # cuBLAS computes float64 and complex types whatever is chosen, and most of test_cuda.py chooses by itself.
  local rest=$(($(left) - 5)) of_op=(tests/test_{linear,random,autocast,mixed_dtypes,memory}.py)
  [ "$rest" -gt 15 ] || rest=15
  tests "$rest" cublaslt tests.log 6 tests/test_{linear,mixed_dtypes,cuda,random,autograd}.py tests
  for library in cublas fused small_blocks; do
    tests "$rest" "$library" tests.log 3 -k "not float64 and not complex" "${of_op[@]}" \
      tests/test_cuda.py::TestDevice::test_{tf32_is_used_only_if_allowed,more_than_two_to_the_31_elements}
  done

  for folder in "" "${CUDA_HOME:-/usr/local/cuda}/bin/" "${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer/"; do
    sanitizer=$(command -v "${folder}compute-sanitizer") && break
  done
  if [ -n "$sanitizer" ]; then
    tools=(memcheck racecheck synccheck)
    for tool in "${tools[@]}"; do
      sanitize "$rest" "$tool"
    done
  else
    echo "== not run: there is no compute-sanitizer here" | tee -a "$out/report.txt"
  fi
  join tests.log "${libraries[@]}" "${tools[@]}"
}

second() {
  local library ran=()
  echo "$failures_of_first" >"$work/rerun"
  for library in "${libraries[@]}"; do
    mapfile -t files < <(sed -n "s/^FAILED $library \([^:]*\).*/\1/p" "$work/rerun" | sort -u | xargs -r ls -d 2>/dev/null)
    if [ ${#files[@]} -gt 0 ]; then
      RERUN=$work/rerun tests 45 "$library" tests.log 4 "${files[@]}"
      ran+=("$library")
    fi
  done
  join tests.log "${ran[@]}"

  # CUDA graphs show which is fastest; eager mode shows what a user waits for, and memory.
  benchmark $(($(left) * 6 / 10)) core --modes graph --suites \
    recommender:bfloat16 ensemble:amp-float16 quick:amp-float16
  benchmark $(($(left) * 6 / 10)) eager --modes eager --contestants loop dense ours_fused ours_small --suites \
    overhead:float16,amp-float16 recommender:bfloat16 ensemble:amp-float16
  benchmark "$(left)" published --modes graph --suites partitioned:amp-float16 \
    --contestants dense masked_dense ours_fused ours_small
}

case $part in
  first) first ;;
  second) second ;;
  time) benchmark "$(left)" suites --suites "$@" ;;
esac
if [ "$part" != first ] && compgen -G "$out/*.json" >/dev/null; then
  python3 -m benchmarks --goals "$out"/*.json >"$out/goals.txt" 2>&1
  head -n 32 "$out/goals.txt"
fi
echo "== $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
