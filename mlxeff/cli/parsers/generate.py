"""The options of `mlxeff generate` and `mlxeff chat`, in the order of how often they are needed."""

from ...assembly import techniques
from ...assembly.options import IGNORE_KEYS, OFFLINE, PREFILL_STEP, TRUST_REMOTE_CODE, natural, positive
from ...hub.catalog import DEFAULT_MODEL
from . import elsewhere
from .common import DEVICE_HELP, add
from .parser import Parser
from .values import above_zero, tokens

MAX_TOKENS = 1024  # default of --max-tokens


def add_generate(parser: Parser) -> None:
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="the prompt; without it, or with -, it is read from standard input",
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    _add_messages(prompt)
    prompt.add_argument("--raw", action="store_true", help="use the prompt as it is, without the model's chat template")
    _add_model(parser)
    _add_answer(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document at the end instead of streaming")
    output.add_argument("--quiet", action="store_true", help="no progress bar, no timings; warnings still show")
    context = _add_context(parser)
    context.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="a file with the KV cache of an earlier call: tokens at the beginning of the prompt that it contains are "
        "not computed again; afterwards it has the cache of this prompt",
    )
    _add_techniques(parser, "generate")
    _add_rest(parser)
    elsewhere.accept(parser)


def add_chat(parser: Parser) -> None:
    conversation = parser.add_argument_group("conversation")
    _add_messages(conversation)
    conversation.add_argument("--resume", metavar="FILE", help="continue a conversation that /save wrote")
    _add_model(parser)
    _add_answer(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="no progress bar, no greeting; warnings still show")
    _add_context(parser)
    _add_techniques(parser, "chat")
    _add_rest(parser)
    elsewhere.accept(parser)


def _add_messages(group) -> None:
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument(
        "--special-in-text",
        action="store_true",
        help="let control tokens that are spelled out in messages, such as <|im_end|>, act as such; else they are text",
    )


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        default=DEFAULT_MODEL,
        help="a folder, a .gguf file, a Hugging Face id or a name from `mlxeff models` (default: %(default)s)",
    )
    group.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help=DEVICE_HELP)
    add(group, [OFFLINE])


def _add_answer(parser: Parser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-tokens",
        metavar="N",
        type=tokens,
        default=MAX_TOKENS,
        help="tokens of the answer at most (default %(default)s; -1: up to the end of the context)",
    )
    group.add_argument(
        "--temp",
        metavar="T",
        type=float,
        default=0.0,
        help="temperature of the sampling; 0, the default, always takes the most probable token",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=natural,
        help="seed of the sampling; one seed gives one text, but for a rare word where a cache holds the beginning of "
        "the prompt (default: random)",
    )
    group.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the answer before TEXT (repeatable)"
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=0.0,
        help="sample from the most probable tokens whose probabilities add up to P; 0: off",
    )
    group.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="sample from the K most probable tokens; 0: off"
    )
    group.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="sample from the tokens that are at least P times as probable as the most probable one; 0: off",
    )
    group.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        help="make the last 20 tokens less probable: divide their logits by X",
    )


def _add_context(parser: Parser):
    group = parser.add_argument_group("context and memory")
    group.add_argument(
        "--context-limit", metavar="N", type=positive, help="tokens in the context (default: the model's own limit)"
    )
    group.add_argument(
        "--truncate",
        action="store_true",
        help="drop what does not fit into the context: the beginning of a prompt, the oldest turns of a chat",
    )
    return group


def _add_techniques(parser: Parser, verb: str) -> None:
    add(parser.add_argument_group("techniques"), techniques.switch_options(verb))


def _add_rest(parser: Parser) -> None:
    speed = parser.add_argument_group("precision and speed")
    add(speed, [*techniques.PRECISION, PREFILL_STEP])
    speed.add_argument(
        "--auto",
        action="store_true",
        help="choose what is predicted as fastest on this machine, without loss: prefill step, threads, drafts. "
        "Options that are given are kept; a line says what was chosen and why",
    )
    speed.add_argument(
        "--max-kl",
        metavar="X",
        type=above_zero,
        help="with --auto: also choices whose KL divergence is known and at most X nats a token, such as kinds of KV "
        "cache and predicted prompts",
    )
    add(parser.add_argument_group("unusual models"), [TRUST_REMOTE_CODE, IGNORE_KEYS])
