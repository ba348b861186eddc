"""Compiling Triton's kernels before they are launched, on all cores, with or without a GPU.

Triton compiles a kernel when it is first launched, one after the other. Here it is found
out what a network will launch, on meta tensors, and compiled in processes beside:

=====================  =================================================================
:mod:`.needed`         what a network launches, its tuning and its self-check included
:mod:`.jobs`           the compiled kernel that a launch needs, and its place in the cache
:mod:`.workers`        the processes
:mod:`.first_use`      what does it when a network first runs
:mod:`.cache`          carrying Triton's cache to another machine, and what was found in it
:mod:`.command`        ``vovnet-fast compile``
=====================  =================================================================
"""
