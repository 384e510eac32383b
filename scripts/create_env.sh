#!/usr/bin/env bash
# Creates the environment that make works in: scripts/create_env.sh DIR
#
# Uses the torch of the active python3 where it has one that will do, and installs $TORCH otherwise. If TORCH is set by the
# caller, that is installed in any case. The active environment is left as it is.
set -euo pipefail

dir=$1
python=${PYTHON:-python3}
default_torch=torch==2.13.0

fail() {
  echo "$*" >&2
  exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "blockdiag needs Python 3.10 or newer, as $python."
command -v "${CXX:-g++}" >/dev/null || fail "blockdiag is compiled with g++, which is not installed (on Debian: apt install g++)."
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  fail "Python's headers are missing (on Debian: apt install python3-dev)."
"$python" -m venv "$dir" || fail "Python's venv module is missing (on Debian: apt install python3-venv)."

# The folders that the active environment imports torch and its dependencies from, if that torch is new enough.
existing=$("$python" - <<'PY' || true
import sys
try:
    import torch
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
        print("\n".join(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))))
except ImportError:
    pass
PY
)

pip() { "$dir/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
if [ -z "${TORCH:-}" ] && [ -n "$existing" ]; then
  echo "Using the torch of $("$python" -c 'import sys; print(sys.prefix)')"
  site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$existing" >"$site/existing-torch.pth"
else
  echo "Installing ${TORCH:-$default_torch}"
  pip install "${TORCH:-$default_torch}"
fi
pip install ninja pybind11 'setuptools>=70' wheel

echo "Building blockdiag and installing what its tests and examples need"
pip install --no-build-isolation --editable '.[demo,lint,test]'
