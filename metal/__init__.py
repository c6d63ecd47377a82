"""The Metal kernels: one .metal a family. `mlxeff.kernels` reads them."""
