"""Models: one file a family, each with `Model(config)`, `model(tokens, cache) → logits` and `model.new_cache()`.

`seams` on a model names the places where a technique can plug in: "cache" (attention goes through `cache.attend`),
"linear" (projections are `nn.Linear`, replaceable) and "feed-forward" (each layer's feed-forward is one module).
"""
