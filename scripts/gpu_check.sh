#!/usr/bin/env bash
# Checks blockdiag on a machine with an NVIDIA GPU, without a network: scripts/gpu_check.sh OUT_DIR
#
# Needs nvcc, and a python3 with a CUDA build of torch, ninja, pybind11, setuptools, pytest, hypothesis and tqdm. Builds a
# copy of this source tree with that python3, runs the tests with FAIL_WITHOUT_CUDA=1 so that none can pass by being
# skipped for want of a GPU, and times blockdiag beside the other ways to write the layer. Leaves in OUT_DIR:
#
#   report.txt              versions, devices, driver
#   build.log, tests.log    what the build and the tests printed
#   timing.log, timing.json the tables, and all numbers with device, driver, torch, cuBLAS and commit
#   *-cublaslt.*            the same with BLOCKDIAG_CUDA_GEMM=cublaslt
#
# Takes under 9 minutes; every part has a limit of its own, and a part that fails does not keep the others from running.
# Exits with 0 only if all parts passed.
set -uo pipefail

[ $# -eq 1 ] || {
  echo "usage: $0 OUT_DIR" >&2
  exit 2
}
mkdir -p "$1"
out=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
BLOCKDIAG_COMMIT=${BLOCKDIAG_COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)}
export BLOCKDIAG_COMMIT

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$root" && tar -cf - VERSION README.md LICENSE CMakeLists.txt setup.py pyproject.toml csrc blockdiag tests benchmarks) |
  tar -xf - -C "$work"
cd "$work" || exit 1
rm -f blockdiag/_C*
failed=()

echo "== build ($BLOCKDIAG_COMMIT)"
FORCE_CUDA=1 timeout 120 python3 setup.py build_ext --inplace >"$out/build.log" 2>&1 || {
  tail -n 30 "$out/build.log"
  exit 1
}
grep -E "^blockdiag .*building" "$out/build.log"
{
  python3 -m blockdiag
  nvidia-smi
} 2>&1 | tee "$out/report.txt"

echo "== tests"
export FAIL_WITHOUT_CUDA=1 FAIL_WITHOUT_CUDA_BUILD=1
timeout 165 python3 -m pytest -q -p no:cacheprovider -k cuda >"$out/tests.log" 2>&1 || failed+=(tests)
tail -n 25 "$out/tests.log"

echo "== tests with cuBLASLt"
BLOCKDIAG_CUDA_GEMM=cublaslt timeout 70 python3 -m pytest -q -p no:cacheprovider -k cuda tests/test_linear.py \
  tests/test_random.py tests/test_autograd.py tests/test_cuda.py >"$out/tests-cublaslt.log" 2>&1 ||
  failed+=(tests-cublaslt)
tail -n 25 "$out/tests-cublaslt.log"

echo "== timing"
# The other ways to write the layer are timed in the full run. INT is Ctrl-C: what was measured until then is kept.
time_it() { # LIMIT MINUTES NAME CONTESTANT...
  timeout --signal=INT --kill-after=10 "$1" python3 -m benchmarks --device cuda --rounds 7 --max-minutes "$2" \
    --contestants "${@:4}" --output "$out/$3.json" >"$out/$3.log" 2>"$out/$3.err" || failed+=("$3")
  cat "$out/$3.log"
  [ -s "$out/$3.json" ] || tail -n 20 "$out/$3.err"
}
time_it 100 1.2 timing dense einsum baddbmm bmm_out grouped_mm
BLOCKDIAG_CUDA_GEMM=cublaslt time_it 50 0.5 timing-cublaslt dense baddbmm

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
