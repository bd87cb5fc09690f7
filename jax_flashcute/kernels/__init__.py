"""Attention kernels in CuTe DSL, and the registry that says which of them serves a call."""
