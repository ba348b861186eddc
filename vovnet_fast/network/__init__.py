"""The network as modules: they hold parameters under their published names, and call ops.

=================  ====================================================================
:mod:`.norms`      batch norms, frozen ones too, from mmdet's ``norm_cfg``
:mod:`.decision`   what runs a call, decided: modules or an op
:mod:`.structure`  whether modules are as they were built, kept until one of them changes
:mod:`.watchers`   who else is looking at a call: then modules run it
:mod:`.fusing`     from modules to ops: the parameters of the fused path
:mod:`.filling`    whether a state dict's tensors can become the network's
:mod:`.telling`    what a module is told beside its input
:mod:`.layers`     convolution layer, stem, gate
:mod:`.blocks`     One-Shot-Aggregation block, stage
:mod:`.model`      :class:`vovnet_fast.VoVNet`
=================  ====================================================================
"""
