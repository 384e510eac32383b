# What scripts/gpu_build.sh and scripts/gpu_check.sh share; to be sourced.
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
prebuilt=$root/build/gpu # a module that was built elsewhere: see gpu_build.sh

# Of the files in these folders: one line that changes with any of them.
digest() {
  (cd "$root" && find "$@" -type f ! -name '*.so' ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum |
    sha256sum | cut -c 1-64)
}
compiled_digest() { digest csrc setup.py VERSION; }
tree_digest() { digest benchmarks blockdiag csrc scripts tests setup.py VERSION; }

# The tree without what is built from it; modification times are kept, so that only what changed is compiled again.
copy_tree() { # DIR
  tar -C "$root" --exclude=./.git --exclude=./build --exclude='./.venv*' --exclude='*.so' --exclude=__pycache__ -cf - . |
    tar -xf - -C "$1"
}
