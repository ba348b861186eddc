// The module _cuda_on_cpu: what vovnet_fast._C.cuda is, with kernels that run on the host.
#include "../bind.h"

PYBIND11_MODULE(_cuda_on_cpu, m) { vovnet_fast::bind::bind_cuda(m); }
