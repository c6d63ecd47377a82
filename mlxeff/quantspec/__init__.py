"""QuantSpec's KV cache (arXiv 2502.10424): keys and values in two planes of 4 bits, one over the other.

planes  numbers → codes of 8 bits, split into an upper and a lower plane, and back
cache   the cache of one layer: planes for the older tokens, float16 for the newest
"""
