"""What `mlxeff eval` does: it measures the quality of a model, with any techniques that are switched on.

measures     log-probabilities → perplexity, KL divergence, equal first choices; knows no model
windows      a text → windows of tokens
scoring      reads given tokens as a setup reads a prompt and decodes an answer, and yields their log-probabilities
subject      options of the command line → a model and how it is run
continuations  the log-likelihood of texts that may follow a context
perplexity, retrieval, choices   the measures of the command, as Python calls
lm_eval      a model for lm-evaluation-harness; needs that package
verbs        the measures and their options as data, for the command line

`measures` and `windows` are for other programs, too: the project's own benchmarks use them.
"""
