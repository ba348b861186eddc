// The module _cuda_on_cpu: what vovnet_fast._C.cuda is, with kernels that run on the host; and what
// is counted there.
#include "../bind.h"
#include "warps.h"

PYBIND11_MODULE(_cuda_on_cpu, m) {
  vovnet_fast::bind::bind_cuda(m);
  m.def("take_counts", [] {
    const cuda_on_cpu::Counts taken = cuda_on_cpu::take_counts();
    pybind11::dict found;
    found["copies"] = taken.copies;
    found["copy_conflicts"] = taken.copy_conflicts;
    found["units"] = taken.units;
    found["unit_conflicts"] = taken.unit_conflicts;
    found["matrices"] = taken.matrices;
    found["matrix_conflicts"] = taken.matrix_conflicts;
    found["words"] = taken.words;
    found["word_conflicts"] = taken.word_conflicts;
    found["products"] = taken.products;
    found["shared_bytes"] = taken.shared_bytes;
    return found;
  });
  m.def("copies_land_early", &cuda_on_cpu::copies_land_early);
  m.def("tf32_rounds", &cuda_on_cpu::tf32_rounds);
}
