# Finds nvcc: Nvcc_EXECUTABLE, inside its toolkit. CMake would take a wrapper script's folder for the toolkit's own, so the
# script that setup.py asks is asked.
execute_process(
  COMMAND ${CMAKE_CURRENT_LIST_DIR}/../scripts/cuda_toolkit.sh
  OUTPUT_VARIABLE Nvcc_TOOLKIT OUTPUT_STRIP_TRAILING_WHITESPACE
)
if(Nvcc_TOOLKIT)
  set(Nvcc_EXECUTABLE ${Nvcc_TOOLKIT}/bin/nvcc)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Nvcc REQUIRED_VARS Nvcc_EXECUTABLE)
