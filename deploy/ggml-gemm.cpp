// A device of ggml: products of quantised weights and many tokens, by the matrix product of a BLAS library.
//
// For Q4_1 and Q5_1, ggml's kernels for x86 compute a product one dot product at a time; the other types have kernels
// that compute tiles of it, which are faster than this. Here a block of rows of the weights is turned into floats, which
// stay in the cache, and multiplied by the activations of all tokens at once. The blocks are shared among the threads of
// OpenMP that ggml's own kernels use; the BLAS library uses none of its own, as its threads and those of OpenMP would
// keep each other from the cores while they spin.
//
// Blocks do not depend on the number of threads, so neither do the results.
//
// It is compiled with llama.cpp, whose build includes llama-cpp.cmake, and loaded by workers.engine.bindings.gemm.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml.h"

namespace {

// cblas_sgemm of a library with integers of 32 bits; the first three are enumerations of CBLAS.
using Sgemm = void (*)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float * a, int lda,
                       const float * b, int ldb, float beta, float * c, int ldc);
constexpr int ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112;

// Rows of the weights in a block: with 2,048 columns they are 768 KiB.
constexpr int64_t BLOCK_ROWS = 96;
// With fewer tokens, turning weights into floats takes longer than it saves.
constexpr int64_t MIN_TOKENS = 48;
constexpr int64_t MIN_SIZE = 32;
// OpenBLAS has room for the work of twice as many threads.
constexpr int MAX_THREADS = 64;

Sgemm sgemm = nullptr;

struct Context {
    int threads = 1;
    // By thread, a block of weights as floats. They are kept when fewer threads compute: texts and prompts alternate.
    std::vector<std::vector<float>> blocks;
};

bool is_supported(const ggml_tensor * op) {
    const ggml_tensor * weights = op->src[0];
    const ggml_tensor * tokens  = op->src[1];
    return (weights->type == GGML_TYPE_Q4_1 || weights->type == GGML_TYPE_Q5_1) && tokens->type == GGML_TYPE_F32 &&
           ggml_is_contiguous(weights) && ggml_is_contiguous(tokens) && ggml_is_contiguous(op) &&
           op->ne[1] >= MIN_TOKENS && op->ne[0] >= MIN_SIZE && tokens->ne[0] >= MIN_SIZE && op->ne[2] == 1 &&
           op->ne[3] == 1 && ggml_get_op_params_i32(op, 1) != GGML_HINT_SRC0_IS_HADAMARD;
}

void multiply(Context & context, ggml_tensor * op) {
    const ggml_tensor * weights = op->src[0];
    const ggml_tensor * tokens  = op->src[1];
    const auto to_float = ggml_get_type_traits(weights->type)->to_float;
    const int64_t columns = weights->ne[0], rows = weights->ne[1];
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const auto * activations = static_cast<const float *>(tokens->data);
    auto * result = static_cast<float *>(op->data);
    context.blocks.resize(std::max<size_t>(context.blocks.size(), context.threads));
    for (std::vector<float> & block : context.blocks) {
        block.resize(std::max<size_t>(block.size(), std::min(BLOCK_ROWS, rows) * columns));
    }

#pragma omp parallel for num_threads(context.threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; block++) {
        float * floats = context.blocks[omp_get_thread_num()].data();
        const int64_t first = block * BLOCK_ROWS, count = std::min(BLOCK_ROWS, rows - first);
        to_float(static_cast<const char *>(weights->data) + first * weights->nb[1], floats, count * columns);
        sgemm(ROW_MAJOR, NO_TRANS, TRANS, tokens->ne[1], count, columns, 1.0f, activations, columns, floats, columns,
              0.0f, result + first, rows);
    }
}

// ---- what ggml asks of a backend ------------------------------------------------------------------------------------

const char * name_of_backend(ggml_backend_t) { return "GEMM"; }
const char * name_of_device(ggml_backend_dev_t) { return "GEMM"; }
const char * description_of_device(ggml_backend_dev_t) { return "products by BLAS"; }
const char * name_of_registry(ggml_backend_reg_t) { return "GEMM"; }

void free_backend(ggml_backend_t backend) {
    delete static_cast<Context *>(backend->context);
    delete backend;
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto & context = *static_cast<Context *>(backend->context);
    try {
        for (int index = 0; index < graph->n_nodes; index++) {
            ggml_tensor * node = graph->nodes[index];
            if (node->op == GGML_OP_MUL_MAT && (node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                multiply(context, node);
            }
        }
    } catch (const std::bad_alloc &) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

void set_threads(ggml_backend_t backend, int threads) {
    static_cast<Context *>(backend->context)->threads = std::clamp(threads, 1, MAX_THREADS);
}

ggml_backend_t create_backend(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = { 0x41, 0x72, 0x72, 0x69, 0x65, 0x72, 0x6f, 0x20, 0x47, 0x45, 0x4d, 0x4d, 0x00, 0x00, 0x00, 0x01 };
    ggml_backend_i calls = {};
    calls.get_name       = name_of_backend;
    calls.free           = free_backend;
    calls.graph_compute  = compute;
    auto * backend = new ggml_backend{ &guid, calls, device, new Context };
    set_threads(backend, GGML_DEFAULT_N_THREADS);
    return backend;
}

// It has no memory of its own: it reads and writes that of the CPU.
void memory_of_device(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }
ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }
bool supports_buffer(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); }

ggml_backend_buffer_t buffer_at(ggml_backend_dev_t, void * address, size_t size, size_t) {
    return ggml_backend_cpu_buffer_from_ptr(address, size);
}

// Accelerators are used beside the CPU, without a layer of a model on them.
enum ggml_backend_dev_type type_of_device(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void properties(ggml_backend_dev_t device, ggml_backend_dev_props * found) {
    *found             = {};
    found->name        = name_of_device(device);
    found->description = description_of_device(device);
    found->type        = type_of_device(device);
    found->caps        = { /* async */ false, /* host_buffer */ false, /* buffer_from_host_ptr */ true,
                           /* events */ false, /* mmap_support */ true };
}

bool supports(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_MUL_MAT:
            return is_supported(op);
        default:
            return false;
    }
}

size_t count_devices(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t device_of(ggml_backend_reg_t registry, size_t) {
    static ggml_backend_device device = [registry] {
        ggml_backend_device made       = {};
        made.iface.get_name            = name_of_device;
        made.iface.get_description     = description_of_device;
        made.iface.get_memory          = memory_of_device;
        made.iface.get_type            = type_of_device;
        made.iface.get_props           = properties;
        made.iface.init_backend        = create_backend;
        made.iface.get_buffer_type     = buffer_type;
        made.iface.buffer_from_host_ptr = buffer_at;
        made.iface.supports_op         = supports;
        made.iface.supports_buft       = supports_buffer;
        made.reg                       = registry;
        return made;
    }();
    return &device;
}

void * function_of(ggml_backend_reg_t, const char * name) {
    return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? reinterpret_cast<void *>(set_threads) : nullptr;
}

}  // namespace

// Which function multiplies. It is called before ggml loads this library, which it refuses otherwise.
extern "C" __attribute__((visibility("default"))) void arriero_gemm_use(void * function) {
    sgemm = reinterpret_cast<Sgemm>(function);
}

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    static ggml_backend_reg registry = {
        GGML_BACKEND_API_VERSION, { name_of_registry, count_devices, device_of, function_of }, nullptr
    };
    return sgemm ? &registry : nullptr;
}
