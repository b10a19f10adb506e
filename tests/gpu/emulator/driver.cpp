// libcuda.so.1 for machines without a GPU: as much of the driver's interface as the cache and its tests call. Streams are threads, which carry out
// what is put on them in its order; device memory is memory of the process, and ends at a page that nobody may touch. Kernels come from
// libraries beside this one: see `build.sh`.
//
// KV_CACHE_EMULATED_GPUS is how many there are (1), KV_CACHE_EMULATED_SEED in which order threads of kernels go.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernel.h"

namespace {

// Errors of the driver, by its numbers.
enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
};

constexpr uint64_t MEMORY_BYTES = 8ull << 30;
constexpr unsigned GPUS_MOST = 64, MULTIPROCESSORS = 3, RESIDENT_BLOCKS = 2;

unsigned number_of(const char* name, unsigned otherwise) {
    const char* text = getenv(name);
    return text ? (unsigned)atoi(text) : otherwise;
}

struct Stream;

struct Context {
    int device = 0;
    std::once_flag used;
    Stream* default_stream = nullptr;
};

unsigned gpus() {
    static const unsigned count = std::min(number_of("KV_CACHE_EMULATED_GPUS", 1), GPUS_MOST);
    return count;
}

Context contexts[GPUS_MOST];
thread_local Context* current;
// What lost the GPU: every call from then on fails with it.
std::atomic<int> lost{SUCCESS};

// ---------------------------------------------------------------------------------------------------------------------
// Memory

struct Range {
    uint64_t bytes;
    int device;  // Of the host: -1.
    void* mapped;
    size_t mapped_bytes;
};

// What is global stays when the process ends: its threads go on until then.
std::mutex& memory = *new std::mutex;
auto& ranges = *new std::map<uint64_t, Range>;
uint64_t used_bytes[GPUS_MOST];

// Bytes that end at a page which nobody may touch, but for what alignment asks for.
void* guarded(size_t bytes, int device) {
    const size_t page = sysconf(_SC_PAGESIZE), round = (bytes + 255) / 256 * 256, all = (round + page - 1) / page * page + page;
    char* mapped = (char*)mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    mprotect(mapped + all - page, page, PROT_NONE);
    char* at = mapped + all - page - round;
    // What nobody has written is no number.
    if (bytes <= 16 << 20) memset(at, 0xff, bytes);
    const std::lock_guard<std::mutex> guard(memory);
    ranges[(uint64_t)at] = {bytes, device, mapped, all};
    if (device >= 0) used_bytes[device] += bytes;
    return at;
}

bool give_back(uint64_t at) {
    const std::lock_guard<std::mutex> guard(memory);
    const auto found = ranges.find(at);
    if (found == ranges.end()) return false;
    if (found->second.device >= 0) used_bytes[found->second.device] -= found->second.bytes;
    if (found->second.mapped) munmap(found->second.mapped, found->second.mapped_bytes);
    ranges.erase(found);
    return true;
}

// The range that an address is in.
bool find_range(uint64_t at, uint64_t* start, Range* range) {
    const std::lock_guard<std::mutex> guard(memory);
    auto found = ranges.upper_bound(at);
    if (found == ranges.begin()) return false;
    --found;
    if (at - found->first >= found->second.bytes) return false;
    *start = found->first, *range = found->second;
    return true;
}

bool is_pageable(const void* at) {
    uint64_t start;
    Range range;
    return !find_range((uint64_t)at, &start, &range);
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events

struct Stream {
    Context* context;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> work;
    bool busy = false, ending = false, capturing = false;
    std::thread thread;

    explicit Stream(Context* context) : context(context), thread([this] { go(); }) {}
    ~Stream() {
        {
            const std::lock_guard<std::mutex> guard(mutex);
            ending = true;
        }
        changed.notify_all();
        thread.join();
    }
    void go() {
        std::unique_lock<std::mutex> guard(mutex);
        for (;;) {
            changed.wait(guard, [&] { return ending || !work.empty(); });
            if (work.empty()) return;
            const auto next = std::move(work.front());
            work.pop_front();
            busy = true;
            guard.unlock();
            next();
            guard.lock();
            busy = false;
            changed.notify_all();
        }
    }
    void put(std::function<void()> next) {
        {
            const std::lock_guard<std::mutex> guard(mutex);
            work.push_back(std::move(next));
        }
        changed.notify_all();
    }
    void drain() {
        std::unique_lock<std::mutex> guard(mutex);
        changed.wait(guard, [&] { return work.empty() && !busy; });
    }
};

std::mutex& all_streams = *new std::mutex;
auto& streams = *new std::vector<std::shared_ptr<Stream>>;

std::shared_ptr<Stream> new_stream(Context* context) {
    const auto stream = std::make_shared<Stream>(context);
    const std::lock_guard<std::mutex> guard(all_streams);
    streams.push_back(stream);
    return stream;
}

// The stream of a handle: null is the default one of the current context.
Stream* stream_of(void* handle) {
    if (handle) return (Stream*)handle;
    Context* const context = current ? current : contexts;
    std::call_once(context->used, [&] { context->default_stream = new Stream(context); });
    return context->default_stream;
}

void drain_all(Context* context) {
    std::vector<std::shared_ptr<Stream>> all;
    {
        const std::lock_guard<std::mutex> guard(all_streams);
        all = streams;
    }
    for (const auto& stream : all) {
        if (stream->context == context) stream->drain();
    }
    stream_of(nullptr)->drain();
}

struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t asked = 0, reached = 0;
    std::chrono::steady_clock::time_point at;

    // The point that was last asked for.
    uint64_t last() {
        const std::lock_guard<std::mutex> guard(mutex);
        return asked;
    }
    void wait(uint64_t point) {
        std::unique_lock<std::mutex> guard(mutex);
        changed.wait(guard, [&] { return reached >= point; });
    }
};

// Events live for as long as something on a stream knows them.
std::mutex& all_events = *new std::mutex;
auto& events = *new std::map<void*, std::shared_ptr<Event>>;

std::shared_ptr<Event> event_of(void* handle) {
    const std::lock_guard<std::mutex> guard(all_events);
    const auto found = events.find(handle);
    return found == events.end() ? nullptr : found->second;
}

int copy(void* to, const void* from, size_t bytes, void* stream) {
    if (lost) return lost;
    // As the driver does with memory that it has not locked: the caller may use it at once.
    const bool at_once = is_pageable(to) || is_pageable(from);
    stream_of(stream)->put([=] { if (!lost) memmove(to, from, bytes); });
    if (at_once) stream_of(stream)->drain();
    return lost;
}

int copy_now(void* to, const void* from, size_t bytes) {
    copy(to, from, bytes, nullptr);
    stream_of(nullptr)->drain();
    return lost;
}

int fill(void* to, uint8_t value, size_t bytes, void* stream) {
    if (lost) return lost;
    stream_of(stream)->put([=] { if (!lost) memset(to, value, bytes); });
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Modules

using Module = std::map<std::string, const emulator::Kernel*>;

std::string folder() {
    Dl_info info;
    if (!dladdr((void*)&contexts, &info)) return ".";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string without(std::string text, const std::string& word) {
    for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at)) text.erase(at, word.size());
    while (!text.empty() && strchr(" \n\r\t", text.back())) text.pop_back();
    return text;
}

// The kernels of a source, by the PTX that is shipped of it. Kernels may have been taken out of it by a new name.
const emulator::Kernel* kernels_of(const std::string& ptx) {
    static std::mutex& mutex = *new std::mutex;
    static auto& known = *new std::map<std::string, const emulator::Kernel*>;
    const std::lock_guard<std::mutex> guard(mutex);
    if (known.empty()) {
        std::ifstream list(folder() + "/modules");
        std::string name, path;
        while (list >> name >> path) {
            std::ifstream file(path);
            std::stringstream text;
            text << file.rdbuf();
            void* library = dlopen((folder() + "/" + name + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
            if (!library) fprintf(stderr, "emulated GPU: %s\n", dlerror());
            const void* table = library ? dlsym(library, "kernels") : nullptr;
            if (table) known[without(text.str(), "gone_")] = (const emulator::Kernel*)table;
        }
    }
    const auto found = known.find(without(ptx, "gone_"));
    return found == known.end() ? nullptr : found->second;
}

struct Error {
    int code;
    const char *name, *text;
};
constexpr Error ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};

const Error* error_of(int code) {
    const Error* const found = std::find_if(std::begin(ERRORS), std::end(ERRORS), [&](const Error& error) { return error.code == code; });
    return found == std::end(ERRORS) ? nullptr : found;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cuGetErrorName(int code, const char** name) {
    const Error* const error = error_of(code);
    return error ? (*name = error->name, SUCCESS) : INVALID_VALUE;
}
API cuGetErrorString(int code, const char** text) {
    const Error* const error = error_of(code);
    return error ? (*text = error->text, SUCCESS) : INVALID_VALUE;
}
API cuInit(unsigned) { return SUCCESS; }
API cuDriverGetVersion(int* version) { return *version = 12040, SUCCESS; }
API cuGetProcAddress_v2(const char*, void** found, int, uint64_t, int* status) {
    *found = nullptr;
    if (status) *status = 1;  // Not found.
    return NOT_FOUND;
}

API cuDeviceGetCount(int* count) { return *count = (int)gpus(), SUCCESS; }
API cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || (unsigned)ordinal >= gpus()) return INVALID_DEVICE;
    return *device = ordinal, SUCCESS;
}
API cuDeviceGetName(char* name, int length, int) {
    snprintf(name, (size_t)length, "emulated GPU");
    return SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = MEMORY_BYTES, SUCCESS; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: return *value = MULTIPROCESSORS, SUCCESS;
        case 75: return *value = 8, SUCCESS;  // Compute capability: 8.0.
        // Also that there are no pools of memory.
        default: return *value = 0, SUCCESS;
    }
}
API cuDevicePrimaryCtxRetain(void** context, int device) {
    contexts[device].device = device;
    return *context = &contexts[device], (int)lost;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* context) { return current = (Context*)context, SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = current, SUCCESS; }
API cuCtxGetDevice(int* device) { return *device = current ? current->device : 0, SUCCESS; }
API cuCtxSynchronize() { return drain_all(current), (int)lost; }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    if (!current) return INVALID_CONTEXT;
    const std::lock_guard<std::mutex> guard(memory);
    *free = MEMORY_BYTES - used_bytes[current->device], *total = MEMORY_BYTES;
    return lost;
}
API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    if (!current) return INVALID_CONTEXT;
    if (lost) return lost;
    if (bytes == 0) return INVALID_VALUE;
    {
        const std::lock_guard<std::mutex> guard(memory);
        if (bytes > MEMORY_BYTES - used_bytes[current->device]) return OUT_OF_MEMORY;
    }
    *address = (uint64_t)guarded(bytes, current->device);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}
API cuMemFree_v2(uint64_t address) {
    drain_all(current);
    return give_back(address) ? (int)lost : (int)INVALID_VALUE;
}
API cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    if (lost) return lost;
    return (*at = guarded(bytes, -1)) ? SUCCESS : OUT_OF_MEMORY;
}
API cuMemFreeHost(void* at) {
    drain_all(current);
    return give_back((uint64_t)at) ? SUCCESS : INVALID_VALUE;
}
API cuMemHostRegister_v2(void* at, size_t bytes, unsigned) {
    if (lost) return lost;
    const std::lock_guard<std::mutex> guard(memory);
    ranges[(uint64_t)at] = {bytes, -1, nullptr, 0};
    return SUCCESS;
}
API cuMemHostUnregister(void* at) { return cuMemFreeHost(at); }
API cuMemHostGetDevicePointer_v2(uint64_t* address, void* at, unsigned) { return *address = (uint64_t)at, SUCCESS; }
API cuPointerGetAttribute(void* to, int attribute, uint64_t address) {
    uint64_t start;
    Range range;
    if (!find_range(address, &start, &range)) return INVALID_VALUE;
    switch (attribute) {
        case 2: return *(unsigned*)to = range.device < 0 ? 1 : 2, SUCCESS;  // Whose memory.
        case 9: return *(int*)to = range.device < 0 ? 0 : range.device, SUCCESS;
        case 11: return *(uint64_t*)to = start, SUCCESS;
        case 12: return *(size_t*)to = range.bytes, SUCCESS;
        default: return INVALID_VALUE;
    }
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) { return copy((void*)to, from, bytes, stream); }
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) { return copy(to, (void*)from, bytes, stream); }
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) { return copy((void*)to, (void*)from, bytes, stream); }
API cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) { return copy((void*)to, (void*)from, bytes, stream); }
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) { return copy_now((void*)to, from, bytes); }
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) { return copy_now(to, (void*)from, bytes); }
API cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) { return fill((void*)to, value, bytes, nullptr); }
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) { return fill((void*)to, value, bytes, stream); }

API cuStreamCreate(void** stream, unsigned) {
    if (!current) return INVALID_CONTEXT;
    return *stream = new_stream(current).get(), (int)lost;
}
API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(void* handle) {
    // Ends behind the lock: it carries out first what is on it.
    std::shared_ptr<Stream> stream;
    const std::lock_guard<std::mutex> guard(all_streams);
    const auto found = std::find_if(streams.begin(), streams.end(), [&](const auto& of) { return of.get() == handle; });
    if (found == streams.end()) return INVALID_VALUE;
    stream = std::move(*found);
    streams.erase(found);
    return SUCCESS;
}
API cuStreamSynchronize(void* stream) { return stream_of(stream)->drain(), (int)lost; }
API cuStreamIsCapturing(void* stream, int* status) { return *status = stream_of(stream)->capturing, SUCCESS; }
API cuStreamBeginCapture_v2(void* stream, int) { return stream_of(stream)->capturing = true, SUCCESS; }
API cuStreamEndCapture(void* stream, void** graph) { return stream_of(stream)->capturing = false, *graph = nullptr, SUCCESS; }
API cuStreamGetCtx(void* stream, void** context) { return *context = stream_of(stream)->context, SUCCESS; }
API cuStreamWriteValue64_v2(void* stream, uint64_t address, uint64_t value, unsigned) {
    if (lost) return lost;
    stream_of(stream)->put([=] { if (!lost) __atomic_store_n((uint64_t*)address, value, __ATOMIC_SEQ_CST); });
    return SUCCESS;
}
API cuStreamWaitEvent(void* stream, void* handle, unsigned) {
    if (lost) return lost;
    const auto event = event_of(handle);
    if (!event) return INVALID_VALUE;
    stream_of(stream)->put([=, point = event->last()] { event->wait(point); });
    return SUCCESS;
}

API cuEventCreate(void** handle, unsigned) {
    if (!current) return INVALID_CONTEXT;
    const auto event = std::make_shared<Event>();
    const std::lock_guard<std::mutex> guard(all_events);
    events[event.get()] = event;
    return *handle = event.get(), (int)lost;
}
API cuEventDestroy_v2(void* handle) {
    const std::lock_guard<std::mutex> guard(all_events);
    return events.erase(handle) ? SUCCESS : INVALID_VALUE;
}
API cuEventRecord(void* handle, void* stream) {
    if (lost) return lost;
    const auto event = event_of(handle);
    if (!event) return INVALID_VALUE;
    uint64_t point;
    {
        const std::lock_guard<std::mutex> guard(event->mutex);
        point = ++event->asked;
    }
    stream_of(stream)->put([=] {
        {
            const std::lock_guard<std::mutex> guard(event->mutex);
            event->reached = std::max(event->reached, point), event->at = std::chrono::steady_clock::now();
        }
        event->changed.notify_all();
    });
    return SUCCESS;
}
API cuEventSynchronize(void* handle) {
    const auto event = event_of(handle);
    if (!event) return INVALID_VALUE;
    return event->wait(event->last()), (int)lost;
}
API cuEventQuery(void* handle) {
    const auto event = event_of(handle);
    if (!event) return INVALID_VALUE;
    const std::lock_guard<std::mutex> guard(event->mutex);
    return lost ? (int)lost : event->reached >= event->asked ? SUCCESS : NOT_READY;
}
API cuEventElapsedTime(float* ms, void* from, void* to) {
    const auto a = event_of(from), b = event_of(to);
    if (!a || !b) return INVALID_VALUE;
    return *ms = std::chrono::duration<float, std::milli>(b->at - a->at).count(), (int)lost;
}

API cuModuleLoadData(void** module, const void* image) {
    if (lost) return lost;
    // What was compiled for a GPU.
    if (memcmp(image, "\x7f" "ELF", 4) == 0) return NO_BINARY_FOR_GPU;
    const std::string ptx = (const char*)image;
    const emulator::Kernel* kernel = kernels_of(ptx);
    if (!kernel) {
        fprintf(stderr, "emulated GPU: this PTX is none of those that it was built with: run tests/gpu/emulator/build.sh again\n");
        return INVALID_PTX;
    }
    auto* loaded = new Module;
    for (; kernel->name; kernel++) {
        // Those that were taken out keep their code and lose their name.
        if (ptx.find(std::string(".entry ") + kernel->name + "(") != std::string::npos) (*loaded)[kernel->name] = kernel;
    }
    return *module = loaded, SUCCESS;
}
API cuModuleUnload(void* module) {
    drain_all(current);
    return delete (Module*)module, SUCCESS;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
    const auto found = ((Module*)module)->find(name);
    if (found == ((Module*)module)->end()) return NOT_FOUND;
    return *function = (void*)found->second, (int)lost;
}
API cuFuncSetAttribute(void*, int, int) { return lost; }
API cuFuncGetAttribute(int* value, int, void*) { return *value = 0, (int)lost; }
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { return *blocks = RESIDENT_BLOCKS, (int)lost; }

API cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z, unsigned,
                   void* stream, void** parameters, void**) {
    static std::atomic<unsigned> launches{0};
    static const unsigned seed = number_of("KV_CACHE_EMULATED_SEED", 1);
    if (lost) return lost;
    if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 || threads == 0 || threads > 1024 || threads_y != 1 || threads_z != 1) return INVALID_VALUE;
    const auto* kernel = (const emulator::Kernel*)function;
    // Parameters are the caller's again when this returns.
    std::vector<std::vector<uint64_t>> values;
    for (unsigned i = 0; i < kernel->parameters; i++) {
        const unsigned bytes = kernel->parameter_bytes[i];
        values.emplace_back((bytes + 7) / 8);
        memcpy(values.back().data(), parameters[i], bytes);
    }
    const unsigned of_launch = seed * 7919 + launches++;
    stream_of(stream)->put([=, values = std::move(values)]() mutable {
        if (lost) return;
        std::vector<void*> at;
        for (auto& value : values) at.push_back(value.data());
        const char* error = kernel->launch(at.data(), {x, y, z}, threads, of_launch);
        if (!error) return;
        fprintf(stderr, "emulated GPU: %s: %s\n", kernel->name, error);
        lost = LAUNCH_FAILED;
    });
    return SUCCESS;
}
