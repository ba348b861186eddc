"""Builds the native extension ``vovnet_fast._C`` from ``csrc/``; used by ``setup.py`` alone.

Needs a C++17 compiler, and nvcc for the CUDA half. torch is neither needed nor imported: the
extension takes raw pointers, so that one build serves every version of torch.

==========================  ==================================================================
``VOVNET_FAST_EXTENSION``   0: no extension. 1: an error where it cannot be built. Unset: built
                            where there is a C++ compiler that works.
``VOVNET_FAST_CUDA``        0: no CUDA half. 1: an error where it cannot be built. Unset: built
                            where there is an nvcc that works.
``VOVNET_FAST_CUDA_ARCHS``  GPUs to compile for, as in ``80;90a`` or ``8.0;9.0a+PTX``. Unset: all
                            that nvcc knows of 80, 86, 89, 90a, 100 and 120, and PTX; on
                            AArch64 of 87 (Jetson Orin) too.
``VOVNET_FAST_BUILD_ISAS``  instruction sets of the CPU half beside the baseline, as in ``avx2``;
                            ``baseline`` for it alone. Unset: all that the compiler knows.
``CXX``, ``CXXFLAGS``,      the compiler, and options to add
``LDFLAGS``
``CUDA_HOME``               where CUDA's toolkit is; it is looked for nowhere else then
``MAX_JOBS``                files that are compiled at the same time
==========================  ==================================================================
"""

from .command import options

__all__ = ["options"]
