# What llama.cpp is built without: included by CMake after project("llama.cpp"), through CMAKE_PROJECT_llama.cpp_INCLUDE.
#
# llama-cpp-python forces this option on in the cache, so that -D cannot switch it off; a variable can. The library holds
# what llama.cpp's own programs share (arguments, chat, HTTP). Arriero calls libllama and ggml only. It is half of the build.
set(LLAMA_BUILD_COMMON OFF)
