"""``vovnet-fast compile``: what a run of a published architecture needs, compiled ahead.

=================  ====================================================================
:mod:`.needed`     what it is: a name, a shape and a mode, as kernels
:mod:`.command`    the command
=================  ====================================================================
"""
