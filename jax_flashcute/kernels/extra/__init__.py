"""Kernels around the attention kernels: what comes before and after the backward."""
