# Finds libtorch: the target LibTorch::LibTorch, and LibTorch_CUDA_LIBRARIES (empty if torch was built without CUDA).
#
# find_package(Torch) insists on a whole CUDA toolkit wherever torch was built with CUDA, even to build for CPUs alone, and
# takes no library from where pip installs it. Only the place of torch's package file is used here. Looks in Torch_DIR and
# CMAKE_PREFIX_PATH, as find_package(Torch) does.
find_path(Torch_DIR TorchConfig.cmake PATHS ${CMAKE_PREFIX_PATH} PATH_SUFFIXES Torch share/cmake/Torch)
if(Torch_DIR)
  get_filename_component(LibTorch_ROOT ${Torch_DIR}/../../.. ABSOLUTE)
  file(STRINGS ${LibTorch_ROOT}/include/torch/headeronly/version.h version REGEX "TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" version "${version}")
  string(REPLACE ";" "." LibTorch_VERSION "${version}")
  foreach(name torch_cpu c10 torch_cuda c10_cuda)
    find_library(LibTorch_${name} ${name} PATHS ${LibTorch_ROOT}/lib NO_DEFAULT_PATH)
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch REQUIRED_VARS Torch_DIR LibTorch_torch_cpu LibTorch_c10 VERSION_VAR LibTorch_VERSION
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
