"""Compiling Triton's kernels before they are launched, on all cores, with or without a GPU.

Triton compiles a kernel when it is first launched, one after the other. Here launches, made or
only planned (:mod:`vovnet_fast.first_use`), are compiled in processes beside:

=====================  =================================================================
:mod:`.jobs`           the compiled kernel that a launch needs, and its place in the cache
:mod:`.workers`        the processes
:mod:`.launchers`      the C modules that launch kernels, which Triton compiles as well
:mod:`.filling`        filling Triton's cache, with a bar, one process at a time
:mod:`.side_by_side`   the same for launches that are about to be made
:mod:`.cache`          carrying Triton's cache to another machine, and what was found in it
=====================  =================================================================
"""
