"""The verbs of the command: what each does in one line, and the commands with which its help begins."""

from typing import NamedTuple


class Verb(NamedTuple):
    """A verb in the help."""

    summary: str
    examples: tuple[str, ...]


EXAMPLES = (
    'mlxeff generate "Why is the sky blue?"',
    "mlxeff chat",
    "mlxeff generate --help",
)
VERBS = {
    "generate": Verb(
        "answer one prompt, word by word",
        (
            'mlxeff generate "Why is the sky blue?"',
            "mlxeff generate --file question.txt --max-tokens 200",
            'mlxeff generate --model mlx-community/Qwen3-0.6B-4bit --temp 0.7 "Hi"',
        ),
    ),
    "chat": Verb(
        "hold a conversation with a model",
        ("mlxeff chat", 'mlxeff chat --system "Answer briefly." --temp 0.7'),
    ),
    "models": Verb("list the built-in models and those in the cache", ("mlxeff models",)),
    "convert": Verb(
        "convert a checkpoint: PyTorch, Hugging Face or GGUF to a folder that mlxeff and mlx-lm load",
        (
            "mlxeff convert smollm2-135m ./small --quantize 4",
            "mlxeff convert smollm2-135m ./seeds --seedlm 4 --dry-run",
        ),
    ),
    "fit": Verb(
        "fit the learned part of a technique to a model",
        ("mlxeff fit dynamoe smollm2-135m --out ./dyn", "mlxeff fit kv-predictor --help"),
    ),
    "trace": Verb(
        "show what a technique does with a text",
        ('mlxeff trace dynamoe ./dyn "The sky is blue." --out page.html',),
    ),
    "bench": Verb("measure speed on this machine", ("mlxeff bench ttft smollm2-135m", "mlxeff bench ttft --help")),
    "eval": Verb(
        "measure the quality of a model, with any techniques switched on",
        ("mlxeff eval ppl smollm2-135m --kv-cache int4", "mlxeff eval kl --help"),
    ),
    "plan": Verb(
        "predict memory and speed of a model on a Mac or on this machine, before its weights are downloaded",
        (
            "mlxeff plan smollm2-135m",
            "mlxeff plan mlx-community/Qwen3-0.6B-4bit --chip m4-pro --memory 24",
        ),
    ),
    "completion": Verb(
        "print a script with which a shell completes verbs, options, models and files",
        ('eval "$(mlxeff completion bash)"', "mlxeff completion zsh > ~/.zfunc/_mlxeff"),
    ),
    "doctor": Verb(
        "say which backends this machine has, and why it lacks the others; pack a bug report",
        ("mlxeff doctor", "mlxeff doctor --bundle report.txt"),
    ),
}
