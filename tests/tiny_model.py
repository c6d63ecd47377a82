"""Random models of two or three layers with a byte-level tokenizer, written as Hugging Face folders: real files,
milliseconds. A Llama, and three of the architectures that only mlx-lm has.
"""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

CONTEXT = 256
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256 + len(SPECIAL),
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}

GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 128,
}
PHI = {
    "model_type": "phi3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
MAMBA = {
    "model_type": "mamba",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "state_size": 8,
    "conv_kernel": 4,
    "time_step_rank": 2,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
}


def random_model(config: dict, seed: int = 0, scale: float = 0.2):
    """A model of `config` with weights from N(0, scale²); norms near 1."""
    from mlxeff.assembly.model import build_model

    mx.random.seed(seed)
    model = build_model(config)
    for name, value in tree_flatten(model.parameters()):
        noise = mx.random.normal(value.shape) * scale
        model.load_weights([(name, 1 + 0.1 * noise if "norm" in name else noise)], strict=False)
    mx.eval(model.parameters())
    return model


def write_tiny_model(folder: Path, config: dict | None = None, seed: int = 0) -> Path:
    """A folder with the random model of CONFIG, changed by `config`; returns it."""
    return write_random_model(folder, CONFIG | (config or {}), seed)


def write_random_model(folder: Path, config: dict, seed: int = 0) -> Path:
    """A folder with a random model of `config`; returns it."""
    return write_model(folder, config, dict(tree_flatten(random_model(config, seed).parameters())))


def write_model(folder: Path, config: dict, weights: dict[str, mx.array]) -> Path:
    """Write config, weights and the byte tokenizer into a new folder; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    write_byte_tokenizer(folder)
    return folder


def write_foreign(folder: Path, config: dict) -> Path:
    """A folder of random weights of one of mlx-lm's own models, with the byte tokenizer."""
    config = config | {"vocab_size": 261, "eos_token_id": 257, "bos_token_id": 256}
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(5)
    weights = {
        name: value if value.ndim == 1 or "A_log" in name else mx.random.normal(value.shape) * 0.2
        for name, value in tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters())
    }
    return write_model(folder, config, weights)


def write_byte_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """tokenizer.json with one token a byte, ids 0 to 255 in the byte-level alphabet's order, then the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[SPECIAL[0], "$A"], special_tokens=[(SPECIAL[0], 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def quantise_folder(folder):
    """Replace the weights of a folder by 8-bit ones, quantised by MLX in groups of 32; returns the folder."""
    weights = mx.load(str(folder / "model.safetensors"))
    packed = {}
    for name, value in weights.items():
        if value.ndim < 2:
            packed[name] = value
            continue
        parts = mx.quantize(value, 32, 8)
        packed |= dict(zip((name, name.replace("weight", "scales"), name.replace("weight", "biases")), parts))
    mx.save_safetensors(str(folder / "model.safetensors"), packed, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 32, "bits": 8}}))
    return folder


def write_words(path: Path, count: int) -> Path:
    """Write a text of so many words of a small vocabulary, so that tokens differ in what networks make of them."""
    generator = np.random.default_rng(5)
    words = ["".join(map(chr, generator.integers(97, 123, generator.integers(2, 9)))) for _ in range(60)]
    path.write_text(" ".join(generator.choice(words, count)))
    return path
