# Shared by scripts/gpu_build.sh and scripts/gpu_check.sh, which source it.
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
prebuilt=$root/build/gpu # a module built elsewhere: see gpu_build.sh

# A hash of the files in these folders.
digest() {
  (cd "$root" && find "$@" -type f ! -name '*.so' ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum |
    sha256sum | cut -c 1-64)
}
compiled_digest() { digest csrc setup.py VERSION; }
tree_digest() { digest benchmarks blockdiag csrc scripts tests setup.py VERSION; }

# Copies the sources. Modification times are kept, so that only what changed is compiled again.
copy_tree() { # DIR
  tar -C "$root" --exclude=./.git --exclude=./build --exclude='./.venv*' --exclude='*.so' --exclude=__pycache__ -cf - . |
    tar -xf - -C "$1"
}
