"""What a network keeps from call to call: arenas, recorded calls, CUDA graphs.

===================  ==================================================================
:mod:`.caches`       what is kept, by shape of the images, and taken out by one call at a time
:mod:`.cpu`          calls of the ``cpu`` backend, recorded and repeated
:mod:`.kept`         a network whose weights may change, run as if they never did
:mod:`.fingerprint`  whether tensors hold what they held
===================  ==================================================================
"""
