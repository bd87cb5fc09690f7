"""From a jaxpr of scalars to CuTe expressions, in a kernel's registers."""
