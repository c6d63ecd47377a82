"""The options of each verb of the command, with their help texts: a module for each verb with many of them.

A technique defines its own options in `assembly.techniques`. Imports no slow module, so that --help is quick.
"""

from ... import __version__
from ...assembly import techniques
from ...eval import verbs as measures
from .bench import add_bench
from .common import add, add_subcommands, sentence
from .convert import add_convert
from .generate import add_chat, add_generate
from .parser import Parser
from .plan import add_plan
from .verbs import EXAMPLES, VERBS

# Options that name a file or a folder, in which "~" stands for a home folder; names of models are resolved elsewhere.
PATHS = "file prompt_cache dst out text train_text calibrate tokenizer plot questions score fewshot".split()
PATHS += ["bundle", "png", "report"]
SHELLS = ("bash", "zsh", "fish")


def build() -> Parser:
    """The parser of the whole command."""
    about = "LLM inference on MLX: OpenELM, the Llama family, and any other model that mlx-lm loads."
    parser = Parser("mlxeff", description=about, examples=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"mlxeff {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.summary, description=sentence(verb.summary), examples=verb.examples)
        ADD[name](sub)
    return parser


def add_fit(parser: Parser) -> None:
    add_subcommands(parser, techniques.FITTED)


def add_trace(parser: Parser) -> None:
    add_subcommands(parser, techniques.TRACED)


def add_eval(parser: Parser) -> None:
    for sub in add_subcommands(parser, measures.MEASURES):
        add(sub.add_argument_group("how the model is run"), measures.run_options())


def add_models(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_completion(parser: Parser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")


def add_doctor(parser: Parser) -> None:
    parser.add_argument(
        "--bundle",
        metavar="FILE",
        nargs="?",
        const="mlxeff-report.txt",
        help="write what a bug report needs to FILE, a new text file (default %(const)s): versions, backends, memory, "
        "caches, settings, the last crash, a check of the kernels, a speed sample; names of user, host and home "
        "folder, access tokens and prompts are left out",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


ADD = {
    "generate": add_generate,
    "chat": add_chat,
    "models": add_models,
    "convert": add_convert,
    "fit": add_fit,
    "trace": add_trace,
    "bench": add_bench,
    "eval": add_eval,
    "plan": add_plan,
    "completion": add_completion,
    "doctor": add_doctor,
}
