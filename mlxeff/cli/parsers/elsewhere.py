"""Options as llama.cpp and mlx-lm spell them.

Where one means exactly what an option here does, `generate` and `chat` take it (SAME). Of the others, and by the other
verbs, the error of an unknown option says which option does that here (NEAR).
"""

import argparse
from collections.abc import Collection

# Spelling → the option here that means the same, with the same values.
SAME = {
    "-c": "--context-limit",
    "--ctx-size": "--context-limit",
    "-f": "--file",
    "-m": "--model",
    "-md": "--draft-model",
    "--model-draft": "--draft-model",
    "-n": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--predict": "--max-tokens",
    "--ignore-chat-template": "--raw",
    "--prefill-step-size": "--prefill-step",
    "-s": "--seed",
    "-sys": "--system",
    "--system-prompt": "--system",
    "--temperature": "--temp",
}
# Spelling → (an option of the verbs for which this holds, or "" for all; what does that here).
NEAR = {
    "-ngl": ("--device", "all layers run on one device: --device gpu or --device cpu"),
    "-ctk": ("--kv-cache", "keys and values are stored alike: --kv-cache int8, int4 or k8v4"),
    "--kv-bits": ("--kv-cache", "--kv-cache int8 or int4"),
    "--kv-group-size": ("--kv-cache", "the groups of --kv-cache int8 and int4 are fixed"),
    "--quantized-kv-start": ("--kv-cache", "--kv-cache int4 keeps the newest tokens in 8 bits by itself"),
    "--max-kv-size": ("--context-limit", "--context-limit N; with --truncate, longer prompts lose their beginning"),
    "-p": ("--raw", "the prompt is given without an option: mlxeff generate 'TEXT'"),
    "--prompt-cache-file": ("--prompt-cache", "--prompt-cache FILE"),
    "--repeat-penalty": ("--repetition-penalty", "--repetition-penalty X looks at the last 20 tokens"),
    "-r": ("--stop", "--stop TEXT ends the answer before TEXT"),
    "-t": ("", "MLXEFF_NUM_THREADS=N in the environment"),
    "-ub": ("--prefill-step", "--prefill-step N"),
    "-b": ("--prefill-step", "--prefill-step N"),
    "--draft-max": ("--num-draft-tokens", "--num-draft-tokens N"),
    "-cnv": ("--raw", "mlxeff chat holds a conversation"),
    "-no-cnv": ("--raw", "--raw takes the prompt without the chat template"),
    "--spec-type": ("--prompt-lookup", "--prompt-lookup, --draft-model MODEL, --quantspec or --draft dynamoe:S"),
    "--adapter-path": ("--model", "adapters (LoRA) are not supported: merge it into the model, as `mlx_lm.fuse` does"),
    "--verbose": ("--quiet", "timings are shown unless --quiet is given"),
    "--hf-path": ("--quantize", "the checkpoint is the first argument: mlxeff convert SRC DST"),
    "--mlx-path": ("--quantize", "the new folder is the second argument: mlxeff convert SRC DST"),
    "--q-bits": ("--quantize", "--quantize BITS:GROUP, as in --quantize 4:64"),
}
# Spelling → another spelling of it.
ALSO = {
    "--gpu-layers": "-ngl",
    "--n-gpu-layers": "-ngl",
    "-ctv": "-ctk",
    "--cache-type-k": "-ctk",
    "--cache-type-v": "-ctk",
    "--prompt": "-p",
    "--reverse-prompt": "-r",
    "--extra-eos-token": "-r",
    "--threads": "-t",
    "--ubatch-size": "-ub",
    "--batch-size": "-b",
    "--draft-n": "--draft-max",
    "-i": "-cnv",
    "--conversation": "-cnv",
    "--interactive": "-cnv",
    "--no-conversation": "-no-cnv",
    "--lora": "--adapter-path",
    "-v": "--verbose",
    "-q": "--q-bits",
    "--q-group-size": "--q-bits",
}


def accept(parser: argparse.ArgumentParser) -> None:
    """Let the parser take the spellings in SAME of its options; its help does not show them."""
    known = parser._option_string_actions
    known.update({other: known[own] for other, own in SAME.items() if own in known and other not in known})


def hint(name: str, known: Collection[str]) -> str | None:
    """Which of the `known` options does what `name` does in other programs; None where that is not known."""
    if (own := SAME.get(name)) in known:
        return f"the option for that is {own}"
    option, text = NEAR.get(ALSO.get(name, name), (None, ""))
    return text if option == "" or option in known else None
