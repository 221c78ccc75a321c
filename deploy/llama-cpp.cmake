# How llama.cpp is built: included by CMake after project("llama.cpp"), through CMAKE_PROJECT_llama.cpp_INCLUDE.
#
# llama-cpp-python forces this option on in the cache, so that -D cannot switch it off; a variable can. The library holds
# what llama.cpp's own programs share (arguments, chat, HTTP). Arriero calls libllama and ggml only. It is half of the build.
set(LLAMA_BUILD_COMMON OFF)

# libmtmd has a small file for each family of projectors, and each reads the same large headers. They are compiled sixteen
# at a time, as llama.cpp does with the models of libllama: three compilations instead of forty-five. The target comes
# later, with the directory of llama-cpp-python.
function(arriero_unite_projectors)
  if(NOT TARGET mtmd)
    return()
  endif()
  get_target_property(sources mtmd SOURCES)
  get_target_property(folder mtmd SOURCE_DIR)
  # The others stay alone: the public ones refuse to be compiled together with internal headers.
  list(FILTER sources EXCLUDE REGEX "^models/.*\\.cpp$")
  list(FILTER sources INCLUDE REGEX "^[^/]*\\.cpp$")
  list(TRANSFORM sources PREPEND "${folder}/")
  set_source_files_properties(${sources} TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  set_target_properties(mtmd PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL arriero_unite_projectors)

# The products of ggml-gemm.cpp and ggml-attention.cpp are a part of ggml's CPU backend. They are for processors with
# x86-64.
function(arriero_add_products)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR MSVC OR NOT TARGET ggml-cpu)
    return()
  endif()
  foreach(name IN ITEMS gemm attention)
    target_sources(ggml-cpu PRIVATE "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/ggml-${name}.cpp")
  endforeach()
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL arriero_add_products)
