"""Kernels for Blackwell (sm_100a, sm_103a): tcgen05 products with accumulators in tensor memory."""
