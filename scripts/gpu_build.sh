#!/usr/bin/env bash
# Builds the module for a GPU machine, where every minute counts and nothing can be installed: scripts/gpu_build.sh
#
# For Python 3.12 and torch 2.11.0 with CUDA 13, sm_80 and sm_90; PYTHON=..., TORCH=torch==X.Y.Z and
# TORCH_CUDA_ARCH_LIST select others. Needs g++ and nvcc, and a few minutes. Imports the module and runs the fake
# device's tests of calls with it. The result is in build/gpu; copy it along with the tree, and scripts/gpu_check.sh
# uses it if it matches:
#
#   _C.*.so   the module, stripped        commit   the tree's commit
#   digest    of the sources compiled     tree     the digest of everything that runs
set -euo pipefail
. "$(dirname "$0")/gpu_common.sh"

for python in "${PYTHON:-python3.12}" "$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python3.12; do
  ! "$python" -c "" 2>/dev/null || break # pyenv's python3.12 on the PATH may not run
done
work=$root/build/gpu-work
env=$work/env-$(basename "$python")-${TORCH:=torch==2.11.0}
mkdir -p "$work/tree"
if [ ! -e "$env/installed" ]; then
  "$python" -m venv --clear "$env"
  "$env/bin/pip" install -q "$TORCH" numpy setuptools ninja pybind11 pytest hypothesis
  touch "$env/installed"
fi
export PATH="$env/bin:$PATH" # the build finds ninja there

# Deleted files would be compiled too if their old copies stayed.
find "$work/tree" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
compiled=$(compiled_digest) tree=$(tree_digest) # now, as the tree may change while this runs
commit=$(git -C "$root" describe --always --dirty --abbrev=40)
copy_tree "$work/tree"
cd "$work/tree"
FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0}" python setup.py -q build_ext --inplace >build.log 2>&1 || { tail -n 30 build.log; exit 1; }
strip blockdiag/_C*.so
PYTHONPATH=. python -m blockdiag
FAIL_WITHOUT_CUDA_BUILD=1 python -m pytest -q -p no:cacheprovider tests/test_fake_device.py -k "calls or tuning or sanitizer"

rm -rf "$prebuilt"
mkdir "$prebuilt"
cp blockdiag/_C*.so "$prebuilt"
echo "$compiled" >"$prebuilt/digest"
echo "$tree" >"$prebuilt/tree"
echo "$commit" >"$prebuilt/commit"
ls -l "$prebuilt"
