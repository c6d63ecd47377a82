"""The sources of the Metal kernels, one .metal file for each family of kernels. `mlxeff.kernels` reads them."""
