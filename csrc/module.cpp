// The Python module kernels._C. Importing it runs the static op registrations of the files linked with it.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <mutex>
#include <set>
#include <thread>

namespace {

// How many threads really share a loop: 1 for all of a build without OpenMP, whatever torch.get_num_threads() says.
int64_t threads_in_use() {
  std::set<std::thread::id> seen;
  std::mutex mutex;
  at::parallel_for(0, 1024, 1, [&](int64_t, int64_t) {
    const std::lock_guard lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return static_cast<int64_t>(seen.size());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators, registered as torch.ops.wsss.*";
  m.def("threads_in_use", &threads_in_use);
  m.attr("has_cuda") = static_cast<bool>(WSSS_WITH_CUDA);
}
