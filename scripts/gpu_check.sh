#!/usr/bin/env bash
# Checks and times blockdiag on a machine with an NVIDIA GPU, without a network: scripts/gpu_check.sh OUT_DIR [PART]
#
# Needs nvcc, and a python3 with a CUDA build of torch, ninja, pybind11, setuptools, pytest, hypothesis and tqdm. Builds a
# copy of this source tree with that python3 (in $TMPDIR, where the next call finds what is compiled), and runs
#
#   all        (default) tests by each library, compute-sanitizer, suites (a), (b) and (c) as the goals have them
#   tests      of these the tests and compute-sanitizer
#   ensemble   suite (a) in fp16 and bf16, with and without autocast, against every contestant
#   published  suite (b) in these
#   more       the other suites in these, and the README's problems in float32
#
# Each takes under 9 minutes: a step is ended at its limit, and one that fails does not keep the others from running. The
# tests fail where they would be skipped for want of a GPU. Leaves in OUT_DIR, 8 files at most:
#
#   report.txt         versions, devices, driver      build.log, tests.log, sanitizer.log   what these printed
#   PART.json ...      all numbers, with device, driver, torch, cuBLAS and commit
#   timing.log         the tables                     goals.txt   which goals are met, for each variant of ours
#
# Exits with 0 only if all steps passed; a goal that is missed is no failure.
set -uo pipefail

part=${2:-all}
case $# in 1 | 2) ;; *) part= ;; esac
case $part in all | tests | ensemble | published | more) ;; *)
  echo "usage: $0 OUT_DIR [all|tests|ensemble|published|more]" >&2
  exit 2
  ;;
esac
mkdir -p "$1"
out=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
BLOCKDIAG_COMMIT=${BLOCKDIAG_COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)}
export BLOCKDIAG_COMMIT FAIL_WITHOUT_CUDA=1 FAIL_WITHOUT_CUDA_BUILD=1
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
# Nothing that a user set is to choose for the tests.
unset BLOCKDIAG_CUDA_GEMM BLOCKDIAG_TUNE

work=${TMPDIR:-/tmp}/blockdiag-gpu-check-$UID
mkdir -p "$work"
find "$work" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
(cd "$root" &&
  tar -cf - VERSION README.md LICENSE CMakeLists.txt setup.py pyproject.toml csrc blockdiag tests benchmarks) |
  tar -xf - -C "$work"
cd "$work" || exit 1
rm -f blockdiag/_C*
failed=()

step() { # LIMIT LOG NAME COMMAND...: the end of what it prints is shown
  echo "== $3"
  local from=0
  [ ! -e "$out/$2" ] || from=$(wc -l <"$out/$2")
  echo "== $3: ${*:4}" >>"$out/$2"
  timeout --signal=INT --kill-after=5 "$1" "${@:4}" >>"$out/$2" 2>&1 || failed+=("$3: status $?")
  tail -n "+$((from + 2))" "$out/$2" | tail -n 12 | cut -c 1-200
}

rm -f "$out"/*.log "$out/report.txt" "$out/goals.txt"
echo "== build ($BLOCKDIAG_COMMIT)"
FORCE_CUDA=1 timeout 85 python3 setup.py build_ext --inplace >"$out/build.log" 2>&1 || {
  tail -n 30 "$out/build.log"
  exit 1
}
grep -E "^blockdiag .*building" "$out/build.log"
{
  python3 -m blockdiag
  nvidia-smi
} 2>&1 | tee "$out/report.txt"

tests() { # LIMIT NAME ARGUMENT...: on several processes where pytest can, which share the cores
  local processes=()
  ! python3 -c "import xdist" 2>/dev/null || processes=(-n 8)
  OMP_NUM_THREADS=2 step "$1" tests.log "$2" \
    python3 -m pytest -q -p no:cacheprovider "${processes[@]}" -k cuda "${@:3}"
}

sanitizer() { # LIMIT TOOL LIBRARIES OPTION...
  local tool folder
  for folder in "" "${CUDA_HOME:-/usr/local/cuda}/bin/" "${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer/"; do
    tool=$(command -v "${folder}compute-sanitizer") && break
  done
  if [ -z "$tool" ]; then
    echo "== $2: not run, there is no compute-sanitizer here" | tee -a "$out/report.txt"
    return
  fi
  # Tensors side by side in torch's cache would hide reads beyond one of them; calls that torch makes to find out what a
  # driver supports fail as they should.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" sanitizer.log "$2" "$tool" --tool "$2" --error-exitcode 9 \
    --report-api-errors no "${@:4}" python3 tests/gpu_subset.py $3
}

all_tests() { # together 295 s
  local of_op=(tests/test_{linear,random,autograd,autocast,cuda,memory}.py)
  tests 115 tests
  BLOCKDIAG_CUDA_GEMM=cublaslt tests 35 tests-cublaslt "${of_op[@]}"
  BLOCKDIAG_CUDA_GEMM=small_blocks tests 35 tests-small_blocks "${of_op[@]}"
  # Few problems, in one process: each new one is measured.
  BLOCKDIAG_CUDA_GEMM=cublaslt BLOCKDIAG_TUNE="$work/tune.json" step 20 tests.log tests-tuned \
    python3 -m pytest -q -p no:cacheprovider -k "cuda and (B128 or B33)" tests/test_linear.py
  sanitizer 45 memcheck ""
  # cuBLAS's kernels are NVIDIA's to check.
  sanitizer 25 racecheck small_blocks --kernel-name kns=blockdiag
  sanitizer 20 synccheck small_blocks --kernel-name kns=blockdiag
}

time_it() { # LIMIT MINUTES NAME ARGUMENT...: INT is Ctrl-C, what was measured until then is kept
  step "$1" timing.log "$3" python3 -m benchmarks --device cuda --rounds 7 --max-minutes "$2" --output "$out/$3.json" "${@:4}"
  [ -s "$out/$3.json" ] || rm -f "$out/$3.json" # killed before it could write
}

halves=amp-float16,float16,bfloat16,amp-bfloat16
of_published=(dense masked_dense ours_lt ours_tuned ours_small)
case $part in
all | tests) all_tests ;;&
all)
  time_it 120 1.7 core --suites recommender:bfloat16 overhead:float16,amp-float16 quick:amp-float16 ensemble:amp-float16
  time_it 35 0.35 published --suites partitioned:amp-float16 --contestants "${of_published[@]}"
  ;;
ensemble) time_it 440 6.7 ensemble --suites ensemble:$halves ;;
published) time_it 440 6.7 published --suites partitioned:$halves --contestants "${of_published[@]}" ;;
more) time_it 440 6.7 more --suites recommender:$halves overhead:$halves quick:$halves,float32 small:$halves ;;
esac
if compgen -G "$out/*.json" >/dev/null; then
  python3 -m benchmarks --goals "$out"/*.json >"$out/goals.txt" 2>&1
  head -n 32 "$out/goals.txt"
fi

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
