"""DynaMoE (arXiv 2502.12325): feed-forward layers of which each token uses as many neurons as a router gives it."""
