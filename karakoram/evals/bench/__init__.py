"""Kernels against the limits of the machine: memory that is read, products that torch multiplies."""
