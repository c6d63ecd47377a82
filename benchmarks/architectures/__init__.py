"""llama.cpp beside mlxeff on tiny GGUF files of every architecture that mlx-lm computes for us.

configs    tiny models of transformers, one for each variant of an architecture
headers    these models through llama.cpp's own converter → the metadata and the shapes of the tensors in each file
files      such a header → a GGUF file with weights that depend on nothing but the tensors' names
"""
