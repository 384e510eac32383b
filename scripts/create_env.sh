#!/usr/bin/env bash
# Creates the environment that make works in: scripts/create_env.sh DIR
#
# Uses the torch of the active python3 if it is new enough, and installs the default one otherwise. A TORCH that the
# caller set is always installed. The active environment is not changed.
set -euo pipefail

dir=$(realpath -m "$1")
python=${PYTHON:-python3}
default_torch=torch==2.13.0

fail() {
  echo "$*" >&2
  exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "blockdiag needs Python 3.10 or newer, but $python is older."
command -v "${CXX:-g++}" >/dev/null || fail "blockdiag is compiled with g++, which is not installed (on Debian: apt install g++)."
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  fail "Python's headers are missing (on Debian: apt install python3-dev)."
"$python" -m venv "$dir" || fail "Python's venv module is missing (on Debian: apt install python3-venv)."

# The folders from which the active environment imports torch and its dependencies, if that torch is new enough.
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

export PATH="$dir/bin:$PATH" # the build finds ninja there
pip() { python -m pip --disable-pip-version-check "$@"; }
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -f "$site/existing-torch.pth"
if [ -z "${TORCH:-}" ] && [ -n "$existing" ]; then
  echo "$existing" >"$site/existing-torch.pth"
  python -c 'import torch; print(f"Using torch {torch.__version__} of {torch.__path__[0]}")'
else
  pip install "${TORCH:-$default_torch}"
fi
pip install -qq ninja pybind11 'setuptools>=70.1'

echo "Building blockdiag"
pip install -qq --no-build-isolation --editable .
python -m blockdiag
