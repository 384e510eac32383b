# Finds nvcc: Nvcc_EXECUTABLE, inside its toolkit. An nvcc on the PATH may be a wrapper script elsewhere, and CMake
# would look for the toolkit there. So ask nvcc itself, as setup.py does.
find_program(Nvcc_FOUND_AS nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin)
if(Nvcc_FOUND_AS)
  execute_process(
    COMMAND ${Nvcc_FOUND_AS} --dryrun unused.cu OUTPUT_VARIABLE dryrun ERROR_VARIABLE dryrun
  )
  if(dryrun MATCHES "#\\$ TOP=([^\n]*)")
    get_filename_component(Nvcc_EXECUTABLE ${CMAKE_MATCH_1}/bin/nvcc REALPATH)
  else()
    set(Nvcc_EXECUTABLE ${Nvcc_FOUND_AS})
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Nvcc REQUIRED_VARS Nvcc_EXECUTABLE)
