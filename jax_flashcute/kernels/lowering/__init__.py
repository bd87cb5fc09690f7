"""From a jaxpr of scalars to CuTe expressions, in a kernel's registers.

``inlining`` makes a flat list of ``equations`` of a jaxpr, ``program`` leaves out what need not be
computed, says how what is left varies, and evaluates it by the ``rules`` of each primitive;
``derivative`` is the program of a score's transposed derivative.
"""
