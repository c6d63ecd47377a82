"""Decoder models: one module for each family (`llama`, `openelm`), each with a class `Model(config)`.

decoder         the base class of the families' models: how they are called
parts           how a model describes itself: its modules by the role that they have
plain, native   two executors: operator by operator, or a whole forward pass as one native CPU call
config, rope    reading config.json, and the rotary embedding that it describes
gguf            GGUF's names and keys → those of the Llama family
gguf_foreign    the same for the architectures that only mlx-lm computes; `gguf_architectures` is their table
adapter         models of other families, built by mlx-lm

The attribute `seams` of a model names the places where a technique can plug in:

"cache"         attention is computed by the cache (`cache.attend`), so another kind of cache can take over
"linear"        the projections are modules of type `nn.Linear`, which can be replaced
"feed-forward"  the feed-forward network of each layer is one module, which can be replaced
"kv"            keys and values of chosen layers can be read, and keys and values from elsewhere appended to the cache
"""
