"""What is run from a shell: ``vovnet-fast`` and what its commands show.

=================  ====================================================================
:mod:`.cli`        the command's arguments
:mod:`.doctor`     ``vovnet-fast doctor``: what there is, and whether it is right
:mod:`.explain`    ``vovnet-fast explain``: what would run each block, and why
:mod:`.plan`       ``vovnet-fast bench --plan``: launches, FLOP and bytes of a network
:mod:`.memory`     ``vovnet-fast bench --memory``: what a training step keeps
:mod:`.convert`    ``vovnet-fast convert``: a checkpoint under another layout's keys
:mod:`.export`     ``vovnet-fast export``: a network as an ONNX file
:mod:`.quantize`   ``vovnet-fast quantize``: a network in eight bits
:mod:`.images`     a folder's images, normalised as a network was trained on them
:mod:`.sources`    which network a command is about: a checkpoint's, or an architecture
:mod:`.classify`   ``vovnet-fast classify``: what a classifier says of images
:mod:`.tuning`     ``vovnet-fast tuning``: choices of engines, shown and shared
:mod:`.regret`     ``vovnet-fast tuning regret``: what choices have cost
:mod:`.compile`    ``vovnet-fast compile``: kernels of a network, ahead of its use
:mod:`.bench`      ``vovnet-fast bench``, and its report
=================  ====================================================================
"""
