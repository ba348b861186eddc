"""The network as it is shipped: folded, packed, captured.

=================  ====================================================================
:mod:`.folded`     batch norms folded into the convolutions of plain modules
:mod:`.freeze`     :func:`vovnet_fast.freeze`: one op, packed weights, CUDA graphs
=================  ====================================================================
"""
