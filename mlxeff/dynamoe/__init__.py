"""DynaMoE (arXiv 2502.12325): a dense model whose feed-forward networks compute as much of themselves as a token needs.

fractions      the mean share of the neurons that a user asks for → the dial of the routers
feed_forward   the feed-forward network with nested experts, and its router
install        the entry `dynamoe` of a config.json ↔ these modules in a model
fit            a dense feed-forward network → one with nested experts, in closed form
distil         the smaller experts, fitted again in closed form where they are used
tune           gradient steps after that, for sensitivities below 1
fisher         how much an error of a layer's output matters to the model's predictions
gptq           affine quantisation of the fitted matrices
calibrate      what routers say of a text → the table of dials
usage          how much the tokens of an answer computed
metal          the Metal kernels of a decoding step

The same by leaving out inputs:

columns         matrices that are stored by their columns
sparse          the feed-forward network whose tokens leave out inputs
sparse_install  its entry `dynamoe` of a config.json ↔ these modules in a model
fit_sparse      a dense feed-forward network → one that leaves out inputs, in closed form
sparse_metal    its Metal kernels
"""
