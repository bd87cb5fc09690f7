"""What the kernels of every architecture share: positions, block ranges, softmax, schedulers."""
