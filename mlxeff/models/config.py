"""Strict reading of a config.json into a dataclass: missing keys, values of a wrong type or size, and unknown keys that
could change the result are errors."""

import re
import shlex
from dataclasses import MISSING, fields
from types import UnionType
from typing import TypeVar, get_args, get_origin

from ..errors import MlxeffError

# Keys that Hugging Face's and mlx-lm's programs write into config.json and that do not affect a forward pass.
IGNORED_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id length_penalty
    max_length min_length mlxeff model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    quantization quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class
    top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()
)


# Keys that describe the training, the tokenizer, the choice of a kernel, another program's use of the model, parts that
# are no part of ours, or the folder itself. They are passed over with a notice, whatever their values are.
MEANINGLESS = re.compile(
    r"""
    _.* | transformers_.* | unsloth_.* | axolotl.* | hub_.* | push_to_hub | cache_implementation | .*_class
    | (.*_)?(dropout|pdrop|layerdrop|droppath)(_.*)? | gradient_checkpointing.* | .*loss(_.*)? | label_smoothing.*
    | init_.* | .*_init(_.*)? | initializer_.* | neftune_.* | ignore_index | train(ing)?_.* | num_labels
    | (pad|bos|eos|unk|sep|cls|mask)_token(_ids?)? | tokenizer(_.*)? | padding_side | truncation_side
    | (max_)?seq(uence)?_len(gth)? | model_max_length | n_ctx | n_positions
    | (use_)?_?flash_att(n|ention).* | attn_implementation | use_(sdpa|xformers|memory_efficient_attention|fused_.*)
    | (use_)?(bf16|fp16|fp32) | (param|compute)_dtype | .*_in_fp32 | return_.* | keys_to_ignore_.*
    | output_(attentions|hidden_states|scores|router_logits)
    | summary_.* | trl_.* | vllm(_.*)? | kv_cache_(dtype|scheme|quant_algo) | bnb_.* | load_in_[48]bit | medusa_.*
    | (text|vision|audio)_config
    | name | model_name(_or_path)? | author | description | license | language | tags | library_name | pipeline_tag
    | datasets? | base_model | version | revision | finetuned
    """,
    re.VERBOSE,
)
# Keys that other families have, and the values with which they change nothing in ours. They are passed over with a
# notice; with another value they are an error.
NEUTRAL = {
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_ratio", "logit_scale", "logits_scaling"), 1),
    **dict.fromkeys(("attn_factor", "extrapolation_factor"), 1),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "embedding_scale"), 1),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "num_experts", "num_local_experts"), 0),
    **dict.fromkeys(("n_routed_experts", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("qk_layernorm", "use_qk_norm", "parallel_attn", "use_parallel_residual"), False),
    **dict.fromkeys(
        ("rope_traditional", "alibi", "use_alibi", "use_bias", "bias", "use_mup", "rope_interleaved"), False
    ),
    **dict.fromkeys(("is_causal", "causal", "use_rope", "use_rmsnorm", "rms_norm"), True),
    **dict.fromkeys(("hidden_activation", "activation_function"), "silu"),
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
}
LONGEST_HINT = 30_000  # characters of a list of keys that a command line surely takes
LARGEST = 2**31 - 1  # a dimension of an MLX array
FLOAT_LIMIT = 1e38  # float32 reaches a little further
T = TypeVar("T")


def passed_over(cls: type, config: dict) -> list[str]:
    """The keys of a config.json that the dataclass `cls` does not have and that change nothing in the model: they have
    no value, or mean nothing for inference, or have a neutral value. The method `unread` of a class names more."""
    names = set(config) - {field.name for field in fields(cls)} - IGNORED_KEYS
    unread = cls.unread(config) if hasattr(cls, "unread") else set()
    return sorted(unread | {name for name in names if changes_nothing(name, config[name])})


def changes_nothing(name: str, value: object) -> bool:
    """Whether an unknown entry of a config changes nothing in the model."""
    if value is None or value in ([], {}, "") or MEANINGLESS.fullmatch(name):
        return True
    if name not in NEUTRAL or isinstance(value, bool) != isinstance(NEUTRAL[name], bool):
        return False
    return value == NEUTRAL[name]


def read_config(cls: type[T], config: dict, ignored: frozenset[str] = frozenset()) -> T:
    """The dataclass `cls`, filled from the dict of a config.json. `ignored` are keys that may be there and are not
    read, like those of `passed_over`. Raises MlxeffError for other unknown keys, for missing ones, and for values that
    are not of the annotated type."""
    known = {field.name: field for field in fields(cls)}
    kind = config.get("model_type", cls.__name__)
    if unknown := sorted(set(config) - set(known) - IGNORED_KEYS - ignored - set(passed_over(cls, config))):
        go_on, names = "delete them from config.json", ",".join(unknown)
        if names.count(",") == len(unknown) - 1 and names.isprintable() and len(names) < LONGEST_HINT:
            go_on += f", or run with --ignore-keys {shlex.quote(names)}"
        text = f"{kind} config: unknown keys {short(unknown)}; if they change nothing in the model, {go_on}"
        raise MlxeffError(text, len(text))
    missing = sorted(name for name, field in known.items() if name not in config and field.default is MISSING)
    if missing:
        raise MlxeffError(f"{kind} config: missing keys {missing}")
    for name in sorted(set(known) & set(config)):
        annotated, value = known[name].type, config[name]
        shown = str(annotated) if get_args(annotated) else annotated.__name__
        require(fits(value, annotated), kind, name, shown, value)
    return cls(**{name: config[name] for name in known if name in config})


def short(value: object) -> str:
    """How messages quote a value of a file: at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def require(condition: bool, kind: str, key: str, wanted: str, got: object) -> None:
    """Raises MlxeffError unless `condition`: in the config of a model `kind`, the value of `key` should have been
    `wanted` (in words), and is `got`."""
    if not condition:
        raise MlxeffError(f"{kind} config: {key}: wanted {wanted}, got {short(got)}")


def fits(value: object, annotated: type | UnionType) -> bool:
    """Whether a JSON value is of an annotated type. Integers are accepted as floats; true and false are no numbers.
    A number that no array size or no float32 can be is of no type."""
    if isinstance(annotated, UnionType):
        return any(fits(value, member) for member in get_args(annotated))
    if get_origin(annotated) is list:
        return isinstance(value, list) and all(fits(item, get_args(annotated)[0]) for item in value)
    if annotated is int:
        return type(value) is int and abs(value) <= LARGEST
    if annotated is float:
        return type(value) in (int, float) and -FLOAT_LIMIT < value < FLOAT_LIMIT  # false for NaN
    return type(value) is annotated
