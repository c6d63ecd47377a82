"""Models: one file a family (`llama`, `openelm`), each with `Model(config)`; `adapter` for those that mlx-lm owns.

`decoder` has the call protocol, `parts` what a family says of itself, `plain` and `native` the executors, `config` and
`rope` what the families share in reading a config, `gguf` the names and keys of GGUF files.

`seams` on a model names the places where a technique can plug in: "cache" (attention goes through `cache.attend`),
"linear" (projections are `nn.Linear`, replaceable), "feed-forward" (each layer's feed-forward is one module) and "kv"
(keys and values are read out, and given ones appended).
"""
