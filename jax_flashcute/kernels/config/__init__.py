"""How kernels are tiled, by architecture and head_dims."""
