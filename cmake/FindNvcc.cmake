# Finds nvcc: Nvcc_EXECUTABLE, inside its toolkit. CMake would look for the toolkit beside a wrapper script, so ask the
# script that setup.py uses.
execute_process(
  COMMAND sh ${CMAKE_CURRENT_LIST_DIR}/../scripts/cuda_toolkit.sh
  OUTPUT_VARIABLE Nvcc_TOOLKIT OUTPUT_STRIP_TRAILING_WHITESPACE
)
if(Nvcc_TOOLKIT)
  set(Nvcc_EXECUTABLE ${Nvcc_TOOLKIT}/bin/nvcc)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Nvcc REQUIRED_VARS Nvcc_EXECUTABLE)
