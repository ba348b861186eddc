"""The network as it is shipped: folded, packed, captured.

===================  ==================================================================
:mod:`.freeze`       :func:`vovnet_fast.freeze`: batch norms are folded, weights packed
:mod:`.frozen`       the module that it makes, and the ways in which that runs
:mod:`.folded`       the same network of plain PyTorch's convolutions
:mod:`.file`         that module as a file
:mod:`.header`       what that and files of quantised networks have in common
:mod:`.layout`       its buffers, by its architecture alone
:mod:`.export`       the network as an ONNX file
:mod:`.onnx_graph`   the nodes of that
:mod:`.onnx_check`   what onnxruntime makes of it, and PyTorch
===================  ==================================================================
"""
