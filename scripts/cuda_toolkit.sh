#!/bin/sh
# Prints the folder of the CUDA toolkit: that of CUDA_HOME or CUDA_PATH, or the one that the nvcc on the PATH belongs to.
# An nvcc on the PATH may be a wrapper script outside its toolkit, so ask nvcc itself. Fails if there is none.
home=${CUDA_HOME:-$CUDA_PATH}
nvcc=${home:+$home/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc)} || exit 1
[ -x "$nvcc" ] || exit 1
top=$("$nvcc" --dryrun unused.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
[ -n "${top:-$home}" ] || exit 1
realpath "${top:-$home}"
