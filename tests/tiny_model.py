"""A two-layer random Llama with a byte-level tokenizer, written as a Hugging Face folder: real files, milliseconds."""

import json
from pathlib import Path

import mlx.core as mx
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


def random_model(config: dict, seed: int = 0, scale: float = 0.2):
    """A model of `config` with weights from N(0, scale²); norms near 1."""
    from mlxeff.loading import build_model

    mx.random.seed(seed)
    model = build_model(config)
    for name, value in tree_flatten(model.parameters()):
        noise = mx.random.normal(value.shape) * scale
        model.load_weights([(name, 1 + 0.1 * noise if "norm" in name else noise)], strict=False)
    mx.eval(model.parameters())
    return model


def write_tiny_model(folder: Path, config: dict | None = None, seed: int = 0) -> Path:
    """Write config, weights and tokenizer; returns the folder."""
    config = CONFIG | (config or {})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = random_model(config, seed)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    write_byte_tokenizer(folder)
    return folder


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
