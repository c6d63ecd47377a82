"""Tiny models of transformers: name of the variant → (model_type, entries of its config beside SIZES)."""

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_ctx": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"state_size": 16, "conv_kernel": 4}
MAMBA2 = {"num_heads": 8, "n_groups": 1, "expand": 2, "chunk_size": 8, "intermediate_size": 128}
LAYERS = {"num_hidden_layers": 4}
HEADS = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 16}
WIDE = {"head_dim": 32}
NARROW = {"head_dim": 16}
NEOX = HEADS | {"intermediate_size": 256, "layer_norm_eps": 1e-5}
LFM2 = {"conv_L_cache": 3, "layer_types": ["conv", "full_attention", "conv", "conv"], "block_ff_dim": 96}
LFM2 |= {"block_auto_adjust_ff_dim": False, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 32, "norm_eps": 1e-5}


def longrope(pairs: int) -> dict:
    """Phi's rotary factors of `pairs` pairs of dimensions, for four times the original context."""
    short, long = [1.0 + 0.1 * i for i in range(pairs)], [1.5 + 0.5 * i for i in range(pairs)]
    scaling = {"type": "longrope", "rope_type": "longrope", "short_factor": short, "long_factor": long}
    context = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    return context | {"rope_scaling": scaling, "sliding_window": None}


MODELS = {
    "cohere2": ("cohere2", LAYERS | NARROW | WINDOW | {"logit_scale": 0.25, "rotary_pct": 1.0}),
    "command-r": ("cohere", {"logit_scale": 0.0625}),
    "ernie4_5": ("ernie4_5", NARROW),
    "exaone4": ("exaone4", LAYERS | NARROW | {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", LAYERS | WIDE | {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3": ("gemma3_text", WIDE | WINDOW | {"num_hidden_layers": 6, "query_pre_attn_scalar": 32}),
    "glm4": ("glm4", NARROW | {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "gpt-oss": ("gpt_oss", LAYERS | NARROW | WINDOW | LOCAL_EXPERTS | {"intermediate_size": 64}),
    "gpt2": ("gpt2", GPT2),
    "gptneox": ("gpt_neox", NEOX | {"rotary_pct": 0.25}),
    "gptneox serial": ("gpt_neox", NEOX | {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "granite": ("granite", GRANITE),
    "granitemoe": ("granitemoe", GRANITE | LOCAL_EXPERTS | {"intermediate_size": 32}),
    "hunyuan-dense": ("hunyuan_v1_dense", NARROW),
    "lfm2": ("lfm2", LAYERS | LFM2),
    "llama experts": ("mixtral", LOCAL_EXPERTS),
    "mamba": ("mamba", MAMBA | {"intermediate_size": 128, "time_step_rank": 4}),
    "mamba2": ("mamba2", MAMBA | NARROW | MAMBA2),
    "nemotron": ("nemotron", NARROW | {"partial_rotary_factor": 0.5, "norm_eps": 1e-5}),
    "olmo2": ("olmo2", {}),
    "olmo2 windows": ("olmo3", LAYERS | WINDOW),
    "olmoe": ("olmoe", HEADS | EXPERTS | {"intermediate_size": 32}),
    "phi2": ("phi", HEADS | {"intermediate_size": 256, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 long": ("phi3", longrope(8)),
    "phi3 partial": ("phi3", longrope(6) | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "qwen2moe": ("qwen2_moe", EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}),
    "qwen3moe": ("qwen3_moe", WIDE | EXPERTS | {"moe_intermediate_size": 32, "norm_topk_prob": True}),
    "seed_oss": ("seed_oss", NARROW | {"attention_bias": True}),
    "smollm3": ("smollm3", LAYERS),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "starcoder": ("gpt_bigcode", GPT2),
    "starcoder2": ("starcoder2", {"use_bias": True, "sliding_window": None}),
}
