"""Strict reading of a config.json into a dataclass: unknown and missing keys and values of a wrong type are errors."""

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


T = TypeVar("T")


def read_config(cls: type[T], config: dict, ignored: frozenset[str] = frozenset()) -> T:
    """The dataclass `cls`, filled from the dict of a config.json. `ignored` are keys that may be there and are not
    read. Raises MlxeffError for unknown and missing keys, and for values that are not of the annotated type."""
    known = {field.name: field for field in fields(cls)}
    kind = config.get("model_type", cls.__name__)
    if unknown := sorted(set(config) - set(known) - IGNORED_KEYS - ignored):
        raise MlxeffError(
            f"{kind} config: unknown keys {unknown}; if they change nothing in the model, delete them from config.json"
        )
    missing = sorted(name for name, field in known.items() if name not in config and field.default is MISSING)
    if missing:
        raise MlxeffError(f"{kind} config: missing keys {missing}")
    for name in sorted(set(known) & set(config)):
        annotated, value = known[name].type, config[name]
        shown = str(annotated) if get_args(annotated) else annotated.__name__
        require(fits(value, annotated), kind, name, shown, value)
    return cls(**{name: config[name] for name in known if name in config})


def require(condition: bool, kind: str, key: str, wanted: str, got: object) -> None:
    """Raises MlxeffError unless `condition`: in the config of a model `kind`, the value of `key` should have been
    `wanted` (in words), and is `got`."""
    if not condition:
        raise MlxeffError(f"{kind} config: {key}: wanted {wanted}, got {got!r}")


def fits(value: object, annotated: type | UnionType) -> bool:
    """Whether a JSON value is of an annotated type. Integers are accepted as floats; true and false are no numbers."""
    if isinstance(annotated, UnionType):
        return any(fits(value, member) for member in get_args(annotated))
    if get_origin(annotated) is list:
        return isinstance(value, list) and all(fits(item, get_args(annotated)[0]) for item in value)
    return type(value) is annotated or (annotated is float and type(value) is int)
