"""A model on packed weights and CPU kernels: the modules, and how they are filled."""
