"""SeedLM (arXiv 2410.10714): weights stored as seeds of a linear-feedback shift register and a few coefficients.

format                the stored form of a matrix, with the formula that decodes it
lfsr                  the shift register
codec                 packing, and the reference decoders in NumPy and in MLX's operations
native, metal         launches of the CPU and the Metal kernels that decode and multiply
linear                linear layers and embeddings with seed-encoded weights
install               putting these layers into a model whose config.json names them
encode                weights → stored form
search, metal_search  the search for the best seed of a block, in NumPy and on a GPU
"""
