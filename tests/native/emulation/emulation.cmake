# SPDX-License-Identifier: Apache-2.0
# CUDA kernels as host C++ (see CONTRIBUTING, step 7), in two builds of the same sources:
#   address  AddressSanitizer and UBSan
#   order    every load and store checked for races and uninitialised shared memory
set(emulation ${CMAKE_CURRENT_LIST_DIR})
set(emulation_address_flags -fsanitize=address,undefined -fno-sanitize=vptr
                            -fno-sanitize-recover=all)
# What is out of bounds does not depend on the schedule: one for each GPU. Races do.
set(emulation_address_seeds 2)
set(emulation_order_seeds 3)
set(emulation_address_link ${emulation_address_flags})
set(emulation_runtime fiber scheduler image limits copies)
set(emulation_address_runtime ${emulation_runtime})
# The order checker takes the place of libtsan: objects are instrumented, nothing is linked.
set(emulation_order_flags -fsanitize=thread)
set(emulation_order_runtime ${emulation_runtime} order)

# Python is not instrumented, so AddressSanitizer has to be in the process before it; libstdc++ too,
# or its exceptions are not found.
set(emulation_preload "")
foreach(library libasan.so libstdc++.so)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${library}
                  OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT IS_ABSOLUTE "${path}")
    message(FATAL_ERROR "${CMAKE_CXX_COMPILER} has no ${library}: the CUDA kernels cannot be "
                        "proven (apt-get install g++, or configure with SIDECHAIN_TESTS=OFF)")
  endif()
  string(APPEND emulation_preload "${path} ")
endforeach()
string(STRIP "${emulation_preload}" emulation_preload)
set(emulation_address_environment "LD_PRELOAD=${emulation_preload}" ASAN_OPTIONS=detect_leaks=0)
set(emulation_order_environment "")

foreach(op IN LISTS cuda_ops)
  set(binding ${CMAKE_CURRENT_BINARY_DIR}/emulation/${op}.cpp)
  file(CONFIGURE OUTPUT ${binding} CONTENT "#include \"torch/${op}_cuda.cu\"\n")
  list(APPEND emulated_bindings ${binding})
endforeach()

# Before csrc: the emulation's cuda/shared.cuh and torch/cuda.h stand in for those of csrc.
function(emulation_target name build)
  string(TOUPPER ${build} macro)
  target_include_directories(${name} BEFORE PRIVATE ${emulation}/include csrc csrc/include)
  target_compile_definitions(${name} PRIVATE EMULATION_${macro})
  target_compile_options(${name} PRIVATE ${warnings} -Wno-unknown-pragmas -Wno-attributes -O1 -g1 ${ARGN})
  # Kernels are found by address for the names in messages.
  set_target_properties(${name} PROPERTIES CXX_VISIBILITY_PRESET default ENABLE_EXPORTS ON
                                           EXCLUDE_FROM_ALL ON)
endfunction()

foreach(build address order)
  list(TRANSFORM emulation_${build}_runtime REPLACE "(.+)" "${emulation}/runtime/\\1.cpp"
       OUTPUT_VARIABLE sources)
  add_library(emulation_${build}_runtime OBJECT ${sources})
  emulation_target(emulation_${build}_runtime ${build})

  set(targets "")
  foreach(test planted planted_copies semantics tap_plan)
    add_executable(emulation_${build}_${test} ${emulation}/test_${test}.cpp)
    list(APPEND targets emulation_${build}_${test})
    add_test(NAME emulation_${build}_${test} COMMAND emulation_${build}_${test})
  endforeach()
  if(SIDECHAIN_TORCH_ROOT AND cuda_ops)
    sidechain_torch_library(emulation_${build} ${emulated_bindings})
    list(APPEND targets emulation_${build})
    foreach(op IN LISTS cuda_ops)
      set(tests tests/ops/test_${op}.py)
      foreach(part contract gradients)
        if(EXISTS ${CMAKE_SOURCE_DIR}/tests/ops/test_${op}_${part}.py)
          list(APPEND tests tests/ops/test_${op}_${part}.py)
        endif()
      endforeach()
      add_test(
        NAME emulation_${build}_${op}
        COMMAND
          ${Python_EXECUTABLE} -m pytest -q -p no:cacheprovider -p emulated
          --emulation=$<TARGET_FILE:emulation_${build}> --emulated-op=${op}
          --seeds=${emulation_${build}_seeds} ${tests}
        WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
      set(environment SIDECHAIN_NATIVE=0 OMP_NUM_THREADS=1
                      PYTHONPATH=${emulation}:${CMAKE_SOURCE_DIR}/tests
                      ${emulation_${build}_environment})
      set_tests_properties(emulation_${build}_${op} PROPERTIES ENVIRONMENT "${environment}")
    endforeach()
  endif()
  foreach(target IN LISTS targets)
    emulation_target(${target} ${build} ${emulation_${build}_flags})
    target_link_options(${target} PRIVATE ${emulation_${build}_link})
    target_link_libraries(${target} PRIVATE emulation_${build}_runtime ${CMAKE_DL_LIBS})
  endforeach()
  list(APPEND test_targets ${targets})
endforeach()
