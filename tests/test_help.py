"""The help of every verb, and the errors of wrong usage: read from the parsers in this process. About 2 seconds."""

import shlex

import pytest

from mlxeff.cli.parsers import build, elsewhere
from test_docs import parsers

NAMES = sorted(parsers(build()))
WIDTH = 80


def named(path):
    return " ".join(path) or "mlxeff"


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@pytest.mark.parametrize("path", NAMES, ids=named)
def test_a_help_begins_with_examples_and_fits(path):
    text = parsers(build())[path].format_help()
    lines = text.splitlines()
    assert lines[0] == "examples:"
    assert lines[1].startswith(f"  {' '.join(('mlxeff', *path[:1]))}") or path[:1] == ("completion",)
    assert [line for line in lines if len(line) > WIDTH] == []
    usage = next(line for line in lines if line.startswith("usage: "))
    assert usage.startswith(f"usage: {' '.join(('mlxeff', *path))} ")


@pytest.mark.parametrize("path", NAMES, ids=named)
def test_examples_are_commands(path, capsys):
    """Each is parsed as it is printed; one of them is of the verb itself."""
    examples = parsers(build())[path].examples
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0].removeprefix('eval "$(').removesuffix(')"'))
        assert words.pop(0) == "mlxeff"
        if words[-1] == "--help":
            assert tuple(words[:-1]) in NAMES
            continue
        values = build().parse_args(words)
        assert values.verb == words[0]
    own = [tuple(shlex.split(each.replace('eval "$(', "").replace(')"', ""))[1:]) for each in examples]
    assert any(words[: len(path)] == path for words in own)


def test_no_option_is_lost_in_a_help():
    """Groups are printed by our own code: each option stands in the help once, and -h in the last group."""
    for path, parser in parsers(build()).items():
        text = parser.format_help()
        for action in parser._actions:
            for name in action.option_strings:
                begun = [line for line in text.splitlines() if line.startswith("  -") and name in line.split("  ")[1]]
                assert begun, f"{named(path)} {name}"
        assert text.index("general:") > max(
            [text.find(f"\n{each.title}:\n") for each in parser._action_groups[2:]] + [0]
        )


def error_of(capsys, *words):
    """The lines on standard error of a wrong usage."""
    with pytest.raises(SystemExit) as caught:
        build().parse_args(words)
    assert caught.value.code == 2
    usage, line, see = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: mlxeff")
    prog, _, message = line.partition(": error: ")
    assert usage.startswith(f"usage: {prog}")
    assert see == f"see {prog} --help"
    return prog, message


WRONG = [
    ("generate a --max-token 4", "mlxeff generate", "no option --max-token: did you mean --max-tokens?"),
    ("generate a --max_tokens 4", "mlxeff generate", "no option --max_tokens: did you mean --max-tokens?"),
    ("generate a --maxtokens=4", "mlxeff generate", "no option --maxtokens: did you mean --max-tokens?"),
    ("chat --resum x", "mlxeff chat", "no option --resum: did you mean --resume?"),
    ("generate a --xyzzy", "mlxeff generate", "no option --xyzzy"),
    ("eval ppl --txt f", "mlxeff eval ppl", "no option --txt: did you mean --text?"),
    ("fit dynamoe m --uot x", "mlxeff fit dynamoe", "no option --uot: did you mean --out?"),
    ("--verison", "mlxeff", "no option --verison: did you mean --version?"),
    ("models a b", "mlxeff models", "wanted options only, got also 'a' 'b'"),
    ("generate a b", "mlxeff generate", "wanted [PROMPT], got also 'b'"),
    ("generate a --device gpus", "mlxeff generate",
     "argument --device: wanted one of auto, cpu, gpu, got 'gpus': did you mean gpu?"),
    ("generate a --kv-cache q8", "mlxeff generate",
     "argument --kv-cache/--kv-dtype: wanted one of float32, float16, bfloat16, int8, int4, k8v4, got 'q8'"),
    ("eval pppl x", "mlxeff eval",
     "argument WHAT: wanted one of ppl, kl, retrieval, choices, got 'pppl': did you mean ppl?"),
    ("generate a -ngl 99", "mlxeff generate",
     "no option -ngl here: all layers run on one device: --device gpu or --device cpu"),
    ("generate a --n-gpu-layers 99", "mlxeff generate",
     "no option --n-gpu-layers here: all layers run on one device: --device gpu or --device cpu"),
    ("generate a --kv-bits 8", "mlxeff generate", "no option --kv-bits here: --kv-cache int8 or int4"),
    ("generate a --max-kv-size 512", "mlxeff generate",
     "no option --max-kv-size here: --context-limit N; with --truncate, longer prompts lose their beginning"),
    ("generate -p Hi", "mlxeff generate",
     "no option -p here: the prompt is given without an option: mlxeff generate 'TEXT'"),
    ("eval ppl m --prefill-step-size 4", "mlxeff eval ppl",
     "no option --prefill-step-size here: the option for that is --prefill-step"),
    ("convert a b --q-bits 4", "mlxeff convert",
     "no option --q-bits here: --quantize BITS:GROUP, as in --quantize 4:64"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "prog", "message"), WRONG, ids=[words for words, _, _ in WRONG])
def test_wrong_usage_says_what_was_meant(capsys, words, prog, message):
    assert error_of(capsys, *words.split()) == (prog, message)


def test_a_wrong_verb_names_the_nearest(capsys):
    prog, message = error_of(capsys, "genrate", "Hi")
    assert prog == "mlxeff"
    assert message.startswith("argument VERB: wanted one of generate, chat, ")
    assert message.endswith("got 'genrate': did you mean generate?")


def test_what_looks_like_an_option_and_is_a_value(capsys):
    """Negative numbers, values with spaces, what follows --, and the value of a short option in the same word."""
    parse = build().parse_args
    assert parse(["generate", "a", "--max-tokens", "-1"]).max_tokens == -1
    assert parse(["generate", "a", "-n20"]).max_tokens == 20
    assert parse(["generate", "--", "--what?"]).prompt == "--what?"
    assert parse(["generate", "--system=-x", "-"]).system == "-x"
    assert parse(["eval", "kl", "m", "--against-options", "--kv-cache int4"]).against_options.kv_cache == "int4"


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_spellings_of_other_programs_are_the_same_options(verb):
    """Each is taken with a value that only its own option has, and none is in the help."""
    parser = parsers(build())[(verb,)]
    values = {"--context-limit": "77", "--file": "f", "--model": "m", "--draft-model": "d", "--max-tokens": "7",
              "--prefill-step": "9", "--seed": "3", "--system": "s", "--temp": "0.5", "--raw": None}  # fmt: skip
    for other, own in elsewhere.SAME.items():
        if own not in parser._option_string_actions:
            assert (verb, own) in {("chat", "--file"), ("chat", "--raw")}
            continue
        given = [] if values[own] is None else [values[own]]
        assert (
            vars(parser.parse_args([other, *given]))
            == vars(parser.parse_args([own, *given]))
            != vars(parser.parse_args([]))
        )
    assert "--n-predict" not in parser.format_help()


def test_the_table_of_other_spellings_names_what_exists():
    known = {option for parser in parsers(build()).values() for option in parser._option_string_actions}
    assert set(elsewhere.SAME.values()) <= known
    assert {option for option, _ in elsewhere.NEAR.values() if option} <= known
    assert set(elsewhere.ALSO.values()) <= set(elsewhere.NEAR)
    for parser in parsers(build()).values():  # none is shadowed by an option of the verbs that the hint is for
        own = {option for each in parser._actions for option in each.option_strings}
        hinted = {name for name, option in elsewhere.SAME.items() if option in own}
        hinted |= {name for name, (option, _) in elsewhere.NEAR.items() if option in own}
        assert not own & hinted - {"--verbose"}
