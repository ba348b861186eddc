"""The arithmetic of a quantised network: its layers as data, its ops by plain PyTorch.

Everything that is not a float is an integer, sums of integers are exact, and each op rounds once::

    acc = integers only, of magnitude below 2**31 whatever the input
    q   = round_to_nearest_even(clamp(float32(acc) * multiplier, low, high))

``float32(acc)`` is the conversion of an int32, rounded to nearest even, and the product is one
fp32 multiplication, rounded to nearest even. Nothing is added to a product, so that it does not
matter whether a compiler contracts multiplications and additions (FMA), and nothing depends on an
order of summation. A kernel that does this equals :mod:`.int8` bit for bit, on any processor.

=================  ====================================================================
activations        unsigned bytes q of value q * scale, a scale for each slot; 0 is zero
weights            signed bytes in [-127, 127], a scale for each output channel
input scales       in the weights, by input channel, before these are rounded
biases             int32, in units of the accumulator
eSE's mean         the integer sum over the pixels, rescaled to 13 bits
eSE's layer        int16 weights, int32 sums; its gate is an integer of at most 15 bits
gate and identity  one integer sum of two products, one rescale
max pool           of the bytes: it commutes with the rounding
=================  ====================================================================

**Why 127 levels.** A byte in [0, 127] is the same number as uint8 and as int8. So the very same
tensors go into every multiplier there is: ``vpdpbusd`` (AVX512-VNNI, AVX-VNNI) and ``tdpbusd``
(AMX), which take u8 x s8; ``vpmaddubsw`` (AVX2), which takes u8 x s8 and saturates pairs of
products at 32767, where 2 * 127 * 127 = 32258; ``smmla``/``sdot`` (Arm), IMMA and IGMMA by Triton's
``tl.dot``, which take s8 x s8. With 255 levels AVX2 would have to widen, and s8 x s8 to subtract
128 and mend the padding. :data:`LEVELS` allows both: 255 halves the error of activations for who
runs on VNNI and AMX alone.

Sources: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (arXiv:1712.05877); Nagel et al., "A White Paper on Neural
Network Quantization" (arXiv:2106.08295); Micikevicius et al., "FP8 Formats for Deep Learning"
(arXiv:2209.05433).

===============  ======================================================================
:mod:`.layers`   what an op is given: weights, biases, scales, as NamedTuples
:mod:`.int8`     the ops in int8: exact, the ground truth of kernels
:mod:`.fp8`      the same ops in e4m3 with fp32 accumulation, emulated
:mod:`.sums`     convolutions without rounding, which both rest on
===============  ======================================================================

A backend has a module with the functions of :mod:`.int8`, with the same signatures: activations
are ``[N, H, W, C]`` views, of which the last dimension is dense and a pixel may be wider than the
view (a slot of a concat buffer); what is written goes to ``out``.
"""

VERSION = 1
"""Of this arithmetic: another number is other features from the same tensors."""

DTYPES = ("int8", "fp8")

LEVELS = (127, 255)
"""Largest activations of int8, the first by default."""
