"""Between JAX and the compiled kernels: compiling, storing and calling them."""
