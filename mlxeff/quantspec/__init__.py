"""QuantSpec (arXiv 2502.10424): keys and values, and weights, in two planes of 4 bits, one over the other.

planes   numbers of the KV cache → codes of 8 bits, split into an upper and a lower plane, and back
cache    the cache of one layer
metal    attention over the planes and storing in them on a GPU
weights  layers with weights of 8 bits in two planes
"""
