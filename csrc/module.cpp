// The Python module kernels._C. Importing it runs the static op registrations of the files linked with it.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators, registered as torch.ops.wsss.*";
  m.attr("has_cuda") = static_cast<bool>(WSSS_WITH_CUDA);
}
