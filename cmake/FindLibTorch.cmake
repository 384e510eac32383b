# Finds libtorch: the target LibTorch::LibTorch, LibTorch_CUDA_LIBRARIES (empty if torch was built without CUDA),
# LibTorch_CUDA_VERSION (if a Python package has it), and LibTorch_RELEASE, the part of the version that fixes the ABI.
# LibTorch_VERSION_FILES differ between builds of torch.
#
# A workaround for find_package(Torch), which requires a whole CUDA toolkit wherever torch was built with CUDA, even to
# build for CPUs only, and finds no library that pip installed. Only the location of torch's package file is used here.
# Looks in Torch_DIR and CMAKE_PREFIX_PATH, as find_package(Torch) does.
#
# Nothing found is cached: a build folder would keep using the old torch after it was replaced or moved.
find_path(Torch_DIR TorchConfig.cmake PATHS ${CMAKE_PREFIX_PATH} PATH_SUFFIXES Torch share/cmake/Torch NO_CACHE)
if(Torch_DIR)
  get_filename_component(LibTorch_ROOT ${Torch_DIR}/../../.. ABSOLUTE)
  file(STRINGS ${LibTorch_ROOT}/include/torch/headeronly/version.h version REGEX "TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" version "${version}")
  string(REPLACE ";" "." LibTorch_VERSION "${version}")
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" LibTorch_RELEASE "${LibTorch_VERSION}")
  file(GLOB LibTorch_VERSION_FILES ${LibTorch_ROOT}/version.py ${LibTorch_ROOT}/build-*
       ${LibTorch_ROOT}/include/torch/headeronly/version.h
  )
  set(LibTorch_CUDA_VERSION)
  if(EXISTS ${LibTorch_ROOT}/version.py)
    file(STRINGS ${LibTorch_ROOT}/version.py line REGEX "^cuda")
    string(REGEX MATCH "[0-9]+\\.[0-9]+" LibTorch_CUDA_VERSION "${line}")
  endif()
  foreach(name torch_cpu c10 torch_cuda c10_cuda)
    find_library(LibTorch_${name} ${name} PATHS ${LibTorch_ROOT}/lib NO_CACHE NO_DEFAULT_PATH)
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch REQUIRED_VARS Torch_DIR LibTorch_torch_cpu LibTorch_c10 VERSION_VAR LibTorch_VERSION HANDLE_VERSION_RANGE
)

if(LibTorch_FOUND)
  set(LibTorch_CUDA_LIBRARIES)
  if(LibTorch_torch_cuda)
    set(LibTorch_CUDA_LIBRARIES ${LibTorch_torch_cuda} ${LibTorch_c10_cuda})
  endif()
  if(NOT TARGET LibTorch::LibTorch)
    add_library(LibTorch::LibTorch INTERFACE IMPORTED)
    target_link_libraries(LibTorch::LibTorch INTERFACE ${LibTorch_torch_cpu} ${LibTorch_c10})
    target_include_directories(
      LibTorch::LibTorch INTERFACE ${LibTorch_ROOT}/include ${LibTorch_ROOT}/include/torch/csrc/api/include
    )
  endif()
endif()
