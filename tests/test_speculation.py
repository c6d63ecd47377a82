"""Speculative decoding: acceptance beside exact distributions, with wrong rules that have to be noticed; drafters; the
loop beside plain decoding; the controller; the command. Some 35 s in all."""

import inspect
import itertools
import json
import sys
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from scipy import stats

import mlxeff
from mlxeff import MlxeffError, RunOptions
from mlxeff.assembly import speculation as assembled
from mlxeff.assembly.draft_weights import coarse_copy
from mlxeff.assembly.model import load_path
from mlxeff.decode import decode, prefill
from mlxeff.generation import stream_generate
from mlxeff.sampling import make_logits_processors, make_sampler
from mlxeff.speculation import following as loop
from mlxeff.speculation import verify as rules
from mlxeff.speculation.control import LONGEST_REST, Controller
from mlxeff.speculation.drafters import LookupDraft, ModelDraft, SelfDraft
from mlxeff.speculation.following import MOST, Speculation
from mlxeff.speculation.verify import Drafted, verify
from test_cli import document, fails
from test_cli import mlxeff as command
from tiny_model import CONFIG, random_model, write_tiny_model

V = 6
RNG = np.random.default_rng(5)
FIRST, SECOND, THIRD = RNG.dirichlet(np.ones(V)), RNG.dirichlet(np.ones(V), V), RNG.dirichlet(np.ones(V), (V, V))
DRAFT_FIRST, DRAFT_SECOND = RNG.dirichlet(np.ones(V)), RNG.dirichlet(np.ones(V), V)
SAMPLER = make_sampler(1.0)


def logs(*rows):
    with np.errstate(divide="ignore"):
        return mx.array(np.log(np.stack(rows)).astype(np.float32))


def draw(row):
    return int(RNG.choice(len(row), p=row))


def pairs(count, rule=verify, change=lambda rows: rows, certain=False):
    """The first two tokens of `count` answers: drafts of two tokens are verified; what is not drafted is drawn."""
    found = np.zeros((V, V), int)
    mx.random.seed(3)
    for _ in range(count):
        one = int(DRAFT_FIRST.argmax()) if certain else draw(DRAFT_FIRST)
        two = int(DRAFT_SECOND[one].argmax()) if certain else draw(DRAFT_SECOND[one])
        rows = None if certain else change(logs(DRAFT_FIRST, DRAFT_SECOND[one]))
        target = logs(FIRST, SECOND[one], THIRD[one, two])
        tokens = rule(target, Drafted(mx.array([one, two], mx.uint32), rows), SAMPLER).tokens
        found[tokens[0], tokens[1] if len(tokens) > 1 else draw(SECOND[tokens[0]])] += 1
    return found


def p_value(found):
    expected = FIRST[:, None] * SECOND * found.sum()
    few = expected < 5
    got, want = ([*each[~few], each[few].sum()] for each in (found, expected))
    return stats.chisquare(got, want).pvalue if few.any() else stats.chisquare(got[:-1], want[:-1]).pvalue


@pytest.mark.parametrize("certain", [False, True])
def test_sampling_is_exact(certain):
    """The joint distribution of two tokens, drafted from another distribution or with certainty."""
    assert p_value(pairs(4000, certain=certain)) > 1e-3


MISTAKES = {
    "a replacement from p": ("mx.maximum(mx.exp(target[:count]) - of_draft, 0)", "mx.exp(target[:count])"),
    "p and q exchanged": ("< p - q)", "< q - p)"),
    "all accepted": ("_leading(mx.log(", "_leading(-1000 + mx.log("),
    "one too many": ("mx.arange(count + 1) < accepted", "mx.arange(count + 1) <= accepted"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_rule_is_noticed(mistake, monkeypatch):
    before, after = MISTAKES[mistake]
    source = inspect.getsource(rules)
    assert before in source
    wrong = ModuleType("mlxeff.speculation.wrong")
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)  # dataclasses look it up
    wrong.__package__ = "mlxeff.speculation"
    exec(source.replace(before, after), vars(wrong))
    assert p_value(pairs(1500, wrong.verify)) < 1e-3


@pytest.mark.parametrize("change", [lambda rows: rows[::-1], lambda rows: mx.log(mx.softmax(rows / 3, axis=1))])
def test_rows_of_another_distribution_than_the_drafts_are_noticed(change):
    """Of another place, or of another temperature."""
    assert p_value(pairs(2000, change=change)) < 1e-3


@pytest.mark.parametrize(
    ("p", "q", "accepted"),
    [
        ([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], 0.0),
        ([0.25] * 4, [0.25] * 4, 1.0),
        ([1, 0, 0, 0], [0.5, 0.5, 0, 0], 0.5),
        ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], 0.6),
    ],
)
def test_acceptance_is_the_overlap(p, q, accepted):
    """Σ min(p, q), and what comes out is p."""
    mx.random.seed(1)
    count, kept, first = 1000, 0, np.zeros(4)
    for _ in range(count):
        drafted = Drafted(mx.array([draw(q)], mx.uint32), logs(np.array(q)))
        found = verify(logs(np.array(p), np.full(4, 0.25)), drafted, SAMPLER)
        kept += found.accepted
        first[found.tokens[0]] += 1
    assert abs(kept / count - accepted) < 4 * (accepted * (1 - accepted) / count) ** 0.5 + 1e-9
    assert np.abs(first / count - p).max() < 0.06


def test_filters_count_for_acceptance():
    """A drafted token that top-k drops is never accepted."""
    target = logs(np.array([0.5, 0.3, 0.2]), np.array([1.0, 0, 0]))
    sampler = make_sampler(1.0, top_k=2)
    assert all(verify(target, Drafted(mx.array([2])), sampler).accepted == 0 for _ in range(50))


def test_greedy_accepts_the_matching_beginning():
    logits = mx.array(np.eye(5, dtype=np.float32)[[1, 2, 3, 4]])
    for drafted, want in (([1, 2, 3], [1, 2, 3, 4]), ([1, 0, 3], [1, 2]), ([0, 2, 3], [1]), ([], [1])):
        found = verify(logits[: len(drafted) + 1], Drafted(mx.array(drafted, mx.uint32)), make_sampler())
        assert found.tokens == want


def test_any_function_may_sample():
    """Without a known distribution, a drafted token is accepted where the function draws the same."""
    logits = mx.array(np.eye(5, dtype=np.float32)[[1, 2, 3]])
    assert verify(logits, Drafted(mx.array([4, 4])), lambda rows: mx.full((rows.shape[0],), 4)).tokens == [4, 4, 4]


def test_damaged_logits_are_refused():
    """Of an accepted token and of the one after it; what follows a refused token does not count."""
    draft, bad, good = Drafted(mx.array([0], mx.uint32)), [0.0, mx.nan], [1.0, 0.0]
    for rows in ([bad, good], [good, bad]):
        with pytest.raises(MlxeffError, match="wanted logits without NaN"):
            verify(mx.array(rows), draft, make_sampler())
    assert verify(mx.array([[0.0, 1.0], bad]), draft, make_sampler()).tokens == [1]


def test_lookup_proposes_what_followed():
    lookup = LookupDraft()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 2, 3]
    assert lookup.propose(text, 4).tokens.tolist() == [4, 5, 6, 7]
    assert lookup.propose([*text, 4, 9], 4).tokens.tolist() == []
    assert lookup.propose([*text, 4, 9, 7, 2, 3, 4], 2).tokens.tolist() == [9, 7]  # the last occurrence
    assert lookup.propose([*text, 4, 9, 1, 2, 3, 4], 2).tokens.tolist() == [5, 6]  # the longest one
    assert lookup.propose([9, 9, 9], 3).tokens.tolist() == [9]  # another text
    assert lookup.propose([3, 3], 3).tokens.tolist() == []
    assert lookup.propose(text, 0).tokens.tolist() == []


class Scripted:
    """A drafter that proposes given tokens."""

    def __init__(self, propose):
        self._propose = propose

    def propose(self, text, most, *_):
        return Drafted(mx.array(self._propose(text, most), mx.uint32))

    def share(self, _model, _cache):
        return 0.0


PROMPT = np.random.default_rng(11).integers(0, 256, 150).tolist()
SIZES = {"head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def model():
    made = random_model(CONFIG | SIZES, seed=2, scale=0.15)
    made.use_native()
    return made


def begun(model, kind, prompt=PROMPT):
    """(A cache with the prompt, its last logits, options.)"""
    held, options = model.new_cache(kind), RunOptions(kv=kind)
    return held, prefill(model, held, mx.array(prompt), 64, options=options), options


def plainly(model, kind, count, sampler=None, processors=(), prompt=PROMPT):
    held, logits, options = begun(model, kind, prompt)
    steps = decode(model, held, logits, sampler or make_sampler(), processors, mx.array(prompt), count, options)
    return [step.token for step in steps]


def speculated(model, kind, count, drafter, fixed, sampler=None, processors=(), prompt=PROMPT):
    held, logits, options = begun(model, kind, prompt)
    following = Speculation(drafter, "drafts", fixed)
    arguments = (sampler or make_sampler(), processors, mx.array(prompt), count, options)
    steps = list(following.follow(model, held, logits, *arguments))
    assert held.length == len(prompt) + count - 1
    return [step.token for step in steps], following.report()["drafts"], steps


ANSWER = 300  # more than four times the 64 tokens after which int4 drops lower halves


@pytest.mark.parametrize("kind", [None, "float16", "int8", "int4", "k8v4"])
@pytest.mark.parametrize("fixed", [1, 4, 7])
def test_greedy_answers_are_those_of_plain_decoding(model, kind, fixed):
    """Whatever is proposed: noise, one token again and again, always something wrong, what is right."""
    want = plainly(model, kind, ANSWER)
    rng = np.random.default_rng(3)
    whole = [*PROMPT, *want]
    drafters = {
        "noise": lambda _, most: rng.integers(0, 256, most),
        "constant": lambda _, most: [7] * most,
        "wrong": lambda text, most: [(token + 1) % 256 for token in whole[len(text) : len(text) + most]],
        "right": lambda text, most: whole[len(text) : len(text) + most],
        "right at first": lambda text, most: [*whole[len(text) : len(text) + 2], *[7] * most][:most],
        "nothing": lambda *_: [],
    }
    for name, propose in drafters.items():
        got, report, steps = speculated(model, kind, ANSWER, Scripted(propose), fixed)
        assert got == want, name
        if name == "right":
            assert report["acceptance"] == 1
            assert sum(step.from_draft for step in steps) == report["accepted_tokens"]
        if name == "wrong":
            assert report["accepted_tokens"] == 0


def test_its_own_draft_on_both_planes_is_always_right(model):
    """Drafted by the same weights on the same bits, every token is accepted."""
    got, report, _ = speculated(model, "int8", 100, ModelDraft(model, RunOptions(kv="int8")), 4)
    assert got == plainly(model, "int8", 100)
    assert report["acceptance"] > 0.99


@pytest.mark.parametrize("lookup", [False, True])
def test_quantspec(model, lookup):
    """Drafts on the upper plane are mostly accepted, the answer is that of the int8 cache, and the cache holds what
    plain decoding leaves in it."""
    drafter = SelfDraft(model, RunOptions(kv="int8"), LookupDraft() if lookup else None)
    got, report, _ = speculated(model, "int8", ANSWER, drafter, 4)
    assert got == plainly(model, "int8", ANSWER)
    assert report["acceptance"] > 0.6
    assert report["drafted_tokens"] > report["accepted_tokens"]
    states = []
    for follow in (decode, Speculation(drafter, "drafts", 4).follow):
        held, logits, options = begun(model, "int8")
        assert len(list(follow(model, held, logits, make_sampler(), (), mx.array(PROMPT), 150, options))) == 150
        states.append([np.array(part) for layer in held.layers for part in layer.state()])
    for plain, drafted in zip(*states, strict=True):
        assert np.abs(plain - drafted).max() < 0.05


def test_a_draft_model_keeps_its_cache(model):
    """Its cache follows the text through accepted and refused drafts, and from one answer to the next. It reads the
    prompt once, and in a round what it drafts and what was committed."""
    draft, read = model.pruned([0]), []
    draft.use_native()
    real, drafter = draft.last_logits, ModelDraft(draft)
    draft.last_logits = lambda tokens, *more: (read.append(tokens.shape[1]), real(tokens, *more))[1]
    want = plainly(model, None, 80)
    for _ in range(2):
        got, report, _ = speculated(model, None, 80, drafter, 3)
        assert got == want
        assert sum(read) < len(PROMPT) + (3 + 4) * report["rounds"]
        read[:] = [len(PROMPT)]
    assert drafter._held == [*PROMPT, *want][: len(drafter._held)]
    longer = [*PROMPT, *want, 5, 6]
    assert speculated(model, None, 20, drafter, 3, prompt=longer)[0] == plainly(model, None, 20, prompt=longer)


def test_processors_see_the_accepted_tokens(model):
    """Penalties depend on every token before, drafted ones that were accepted included."""
    processors = make_logits_processors(repetition_penalty=1.5, presence_penalty=0.5)
    want = plainly(model, "int8", 120, processors=processors)
    whole = [*PROMPT, *want]
    for propose in (
        lambda text, most: whole[len(text) : len(text) + most],
        lambda text, most: [*whole[len(text) : len(text) + 1], *[9] * most][:most],
    ):
        assert speculated(model, "int8", 120, Scripted(propose), 4, processors=processors)[0] == want
    drafter = SelfDraft(model, RunOptions(kv="int8"))
    assert speculated(model, "int8", 120, drafter, 4, processors=processors)[0] == want


@pytest.mark.parametrize("draft", ["self", "model", "lookup", "both"])
def test_sampled_answers_have_the_same_distribution(model, draft):
    """Second and third tokens of many answers, beside those of plain sampling."""
    small = model.pruned([0])
    small.use_native()
    options = RunOptions(kv="int8")
    drafter = {
        "self": SelfDraft(model, options),
        "model": ModelDraft(small),
        "lookup": LookupDraft(),
        "both": SelfDraft(model, options, LookupDraft()),
    }[draft]
    prompt, sampler = [*PROMPT[:20], *PROMPT[:20]], make_sampler(1.2, top_k=3)
    mx.random.seed(5)
    count, tables = 220, []
    for run in (
        lambda: plainly(model, "int8", 3, sampler, prompt=prompt),
        lambda: speculated(model, "int8", 3, drafter, 2, sampler, prompt=prompt)[0],
    ):
        seen = [tuple(run()[1:]) for _ in range(count)]
        tables.append(seen)
    kinds = sorted(set(itertools.chain(*tables)))
    table = np.array([[seen.count(kind) for kind in kinds] for seen in tables])
    assert stats.chi2_contingency(table[:, table.sum(axis=0) >= 10]).pvalue > 1e-3


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 17])
def test_a_consumer_that_stops_leaves_what_was_yielded(model, stop):
    """In the middle of an accepted draft too, as at an end token."""
    whole = [*PROMPT, *plainly(model, "int8", 40)]
    held, logits, options = begun(model, "int8")
    following = Speculation(Scripted(lambda text, most: whole[len(text) : len(text) + most]), "drafts", 4)
    steps = following.follow(model, held, logits, make_sampler(), (), mx.array(PROMPT), 40, options)
    got = [step.token for step in itertools.islice(steps, stop)]
    steps.close()
    assert got == whole[len(PROMPT) : len(PROMPT) + stop]
    assert held.length == len(PROMPT) + stop - 1


def test_history_is_needed(model):
    held, logits, options = begun(model, None)
    with pytest.raises(MlxeffError, match="wanted the ids of all tokens so far"):
        next(Speculation(LookupDraft(), "drafts").follow(model, held, logits, make_sampler(), options=options))
    with pytest.raises(MlxeffError, match="draft tokens: wanted 1 to 7, got 8"):
        Speculation(LookupDraft(), "drafts", 8)


def simulate(costs, acceptance, tokens=4000, known=None):
    """(Seconds, widths) of an answer where a round of width w costs costs[w] and each drafted token is accepted with
    this probability."""
    rng, control, spent, given = np.random.default_rng(1), Controller(MOST, known=known), 0.0, 0
    while given < tokens:
        width = control.width()
        if width == 0:
            count = control.rest()
            control.note_plain(count, count * costs[0])
            spent, given = spent + count * costs[0], given + count
            continue
        right = rng.random(width) < acceptance
        accepted = int(np.cumprod(right).sum())
        control.note(width, width, accepted, costs[width])
        spent, given = spent + costs[width], given + accepted + 1
    return spent / given, control


def best(costs, acceptance):
    expected = [sum(acceptance**i for i in range(width + 1)) for width in range(MOST + 1)]
    return min(cost / tokens for cost, tokens in zip(costs, expected, strict=True))


@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("slope", [0.1, 0.4, 0.8, 1.5])
def test_the_controller_finds_the_best_width(acceptance, slope):
    """Within 6 % of the best one, and never more than 3 % slower than plain decoding, its first measurements
    included."""
    costs = [1 + slope * width for width in range(MOST + 1)]
    got, _ = simulate(costs, acceptance)
    assert got < 1.06 * best(costs, acceptance)
    assert got < 1.03 * costs[0]


@pytest.mark.parametrize("busy", [1, 4])
def test_a_cost_that_was_measured_on_a_busy_machine_is_corrected(busy):
    """The width `busy` seems to take three times as long at first."""
    costs, slow = [1 + 0.4 * width for width in range(MOST + 1)], 6
    rng, control, spent, given = np.random.default_rng(2), Controller(MOST), 0.0, 0
    while given < 3000:
        width = control.width()
        if width == 0:
            control.note_plain(8, 8 * costs[0])
            spent, given = spent + 8 * costs[0], given + 8
            continue
        accepted = int(np.cumprod(rng.random(width) < 0.95).sum())
        slow -= width == busy
        control.note(width, width, accepted, costs[width] * (3 if width == busy and slow > 0 else 1))
        spent, given = spent + costs[width], given + accepted + 1
    assert spent / given < 1.06 * best(costs, 0.95)


def test_drafting_that_does_not_pay_rests():
    got, control = simulate([1 + width for width in range(MOST + 1)], 0.5)
    assert control.off
    assert control._rest == LONGEST_REST
    assert got < 1.02
    again, _ = simulate([1 + width for width in range(MOST + 1)], 0.5, 200, known=control.costs)
    assert again < 1.03


@pytest.mark.parametrize(("share", "tried"), [(0.95, False), (0.87, False), (0.8, True), (0.0, True)])
def test_drafts_that_cannot_pay_are_not_tried(share, tried):
    """A draft of seven tokens that are always right gives eight tokens for the time of 1 + 7 share."""
    control, widths = Controller(MOST), []
    control.share = share
    for _ in range(10):
        widths.append(control.width())
        if widths[-1]:
            control.note(widths[-1], widths[-1], widths[-1], 1.0)
        else:
            control.note_plain(control.rest(), control.rest() * 1.0)
    assert any(widths) == tried
    assert control.off != tried


def test_the_share_of_a_draft(model):
    """By hand: float32 weights and a copy, and the bytes of a cache of two layers, two heads of 64."""
    draft, held = SelfDraft(coarse_copy(model, 4), RunOptions(kv="int8")), begun(model, "int8")[0]
    tiles = -(-150 // 16)
    both, upper = 64 * 2 * 16 + 128, 64 * 16 + 128
    newest = 150 // 16 // 4 * 4 - 4  # tiles before the newest 64 to 127 tokens
    full, drafted = (2 * len(held.layers) * size for size in (tiles * both, newest * upper + (tiles - newest) * both))
    assert held.read_bytes() == full
    assert held.read_bytes("draft") == drafted
    own, other = (sum(array.nbytes for _, array in tree_flatten(m.parameters())) for m in (draft.model, model))
    assert draft.share(model, held) == (own + drafted) / (other + full)
    assert ModelDraft(draft.model).share(model, held) == own / other
    assert ModelDraft(draft.model, lookup=LookupDraft()).share(model, held) == LookupDraft().share(model, held) == 0


def test_drafting_that_rests_is_tried_again():
    """Drafts that are never right at first, and always right from some round on, are drafted again in the end."""
    control, found = Controller(MOST), []
    for right, rounds in ((False, 60), (True, 300)):
        for _ in range(rounds):
            if width := control.width():
                control.note(width, width, width if right else 0, 1 + 0.1 * width)
            else:
                control.note_plain(control.rest(), float(control.rest()))
        found.append(control.off)
    assert found == [True, False]


def test_the_report_counts_what_was_drafted_and_accepted(model, monkeypatch):
    """Of four drafted tokens two are right. On a clock that only drafting (1 s) and verifying (10 s) move on. The last
    round drafts two, as one more token is all that it may add."""
    whole, clock = [*PROMPT, *plainly(model, None, 31)], [0.0]

    def propose(text, most):
        clock[0] += 1
        right = whole[len(text) : len(text) + most]
        return [token if place < 2 else (token + 1) % 256 for place, token in enumerate(right)]

    def slowly(*arguments):
        clock[0] += 10
        return verify(*arguments)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(loop, "verify", slowly)
    got, report, steps = speculated(model, None, 31, Scripted(propose), 4)
    assert got == whole[len(PROMPT) :]
    assert [step.from_draft for step in steps] == [False] + [True, True, False] * 10
    wanted = {"rounds": 10, "drafted_tokens": 38, "accepted_tokens": 20, "plain_tokens": 1, "tokens_per_round": 3.0}
    wanted |= {"acceptance": round(20 / 38, 4), "acceptance_per_token": round(20 / 29, 4)}
    assert {name: report[name] for name in wanted} == wanted
    assert report["seconds"] == {"draft": 10.0, "verify": 100.0, "plain": 0.0}
    assert report["round_ms"]["4"] == 11000.0


def test_a_fixed_width_stays():
    control = Controller(MOST, 3)
    for _ in range(20):
        assert control.width() == 3
        control.note(3, 3, 0, 100.0)
    assert not control.off


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = CONFIG | SIZES | {"max_position_embeddings": 1024, "eos_token_id": 258}
    return write_tiny_model(tmp_path_factory.mktemp("speculation") / "tiny", config)


TEXT = "The planes hold the older tokens, and the older tokens hold the planes. " * 4


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--quantspec", "--draft-weights", "shared"), "quantspec"),
        (("--quantspec", "--draft-weights", "q4", "--prompt-lookup"), "quantspec"),
        (("--prompt-lookup",), "prompt_lookup"),
    ],
)
def test_through_the_command(folder, options, name):
    plain = ("--kv-cache", "int8") if name == "quantspec" else ()
    arguments = (TEXT, "--raw", "--max-tokens", 40)
    want = document(folder, *arguments, *plain)
    got = document(folder, *arguments, *options, "--num-draft-tokens", 3)
    assert got["token_ids"] == want["token_ids"]
    assert got["timings"]["kv_dtype"] == want["timings"]["kv_dtype"]
    report = got["timings"][name]
    assert report["rounds"] > 0
    assert sum(report["widths"].values()) == report["rounds"]
    assert [key for key in ("quantspec", "draft_model", "prompt_lookup") if got["timings"][key]] == [name]
    _, error = command("generate", *arguments, "--model", folder, *options)
    assert ("nothing drafted" if "shared" in options else "tokens a round") in error
    if "shared" in options:  # whether the others pay is a matter of time, which a busy machine decides
        assert "plain decoding is faster here: drafting rests" in error


def test_a_draft_model_through_the_command(folder):
    arguments = (TEXT, "--raw", "--max-tokens", 30)
    got = document(folder, *arguments, "--draft-model", folder, "--num-draft-tokens", 4)
    assert got["token_ids"] == document(folder, *arguments)["token_ids"]
    assert got["timings"]["draft_model"]["acceptance"] > 0.95


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--quantspec", "--kv-cache", "float16"), "--quantspec: wanted --kv-cache int8, whose upper plane drafts, "),
        (("--quantspec", "--draft-model", "x"), "--quantspec: the model drafts itself, so --draft-model has no place"),
        (
            ("--num-draft-tokens", 3),
            "--num-draft-tokens: wanted --quantspec, --draft-model, --draft or --prompt-lookup with it",
        ),
        (("--draft-weights", "q4"), "--draft-weights: wanted --quantspec with it, got none"),
        (("--draft-model", "no/such-model.gguf", "--offline"), "no/such-model.gguf"),
    ],
)
def test_contradictions_are_one_line(folder, options, line):
    assert line in fails("generate", "Hello", "--model", folder, *options)


def test_heads_without_planes_and_other_vocabularies_are_one_line(tiny_folder, folder, tmp_path):
    error = fails("generate", "Hello", "--model", tiny_folder, "--quantspec")
    assert error == "KV cache: wanted heads of 64, 80, 96, 128 numbers for int8, got 16"
    other = write_tiny_model(tmp_path / "other", CONFIG | SIZES | {"vocab_size": 300})
    data = json.loads((other / "tokenizer.json").read_text())
    for name in ("a", "b"):
        data["model"]["vocab"][name] = data["model"]["vocab"].pop(name) ^ 3
    (other / "tokenizer.json").write_text(json.dumps(data))
    error = fails("generate", "Hello", "--model", folder, "--draft-model", other)
    assert "vocabulary mismatch" in error


def test_python_users_of_mlx_lm(folder):
    """`draft_model` with `num_draft_tokens`, and `kv_bits`, as arguments of mlx-lm's function."""
    model, tokenizer = mlxeff.load(str(folder))
    want = [each.token for each in stream_generate(model, tokenizer, TEXT, 20)]
    got = list(stream_generate(model, tokenizer, TEXT, 20, model, num_draft_tokens=3))
    assert [each.token for each in got] == want
    assert any(each.from_draft for each in got)
    eight = [each.token for each in stream_generate(model, tokenizer, TEXT, 20, kv_bits=8)]
    int8 = [each.token for each in stream_generate(model, tokenizer, TEXT, 20, options=RunOptions(kv="int8"))]
    assert eight == int8
    with pytest.raises(MlxeffError, match="kv_bits: wanted 4 or 8, and no other kind of KV cache, got 3"):
        next(stream_generate(model, tokenizer, TEXT, 5, kv_bits=3))
    with pytest.raises(MlxeffError, match="wanted draft_model or following, got both"):
        next(stream_generate(model, tokenizer, TEXT, 5, model, following=Speculation(LookupDraft(), "x")))


def test_costs_are_kept_for_the_next_run(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXEFF_CACHE", str(tmp_path))
    assert assembled.read_costs("a") == {}
    assembled.keep_costs("a", {0: 1.0, 4: 2.5})
    assembled.keep_costs("b", {0: 3.0, 1: 4.0})
    assert assembled.read_costs("a") == {0: 1.0, 4: 2.5}
    (tmp_path / "speculation.json").write_text("[damaged")
    assert assembled.read_costs("b") == {}
    assembled.keep_costs("b", {0: 3.0, 1: 4.0})
    assert assembled.read_costs("b") == {0: 3.0, 1: 4.0}
    assert [path.name for path in tmp_path.iterdir()] == ["speculation.json"]


def test_a_session_keeps_one_cache_over_turns(folder):
    loaded = load_path(folder)
    from mlxeff.generation import Session

    drafting = Speculation(SelfDraft(loaded.model, RunOptions(kv="int8")), "quantspec", 3)
    answers = []
    for following in (None, drafting):
        session, ids, found = Session(loaded.model, loaded.tokenizer), list(PROMPT), []
        for turn in range(3):
            options = {"options": RunOptions(kv="int8"), "following": following}
            answer = [each.token for each in session.stream(ids, max_tokens=9, **options)]
            ids += [*answer, *PROMPT[turn : turn + 20]]
            found.append((answer, session.reused))
        answers.append(found)
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_with_kv_prediction_on_real_weights(smollm2_gguf):
    """A predicted prompt in the planes, then drafts on them: the answer without drafts. And a long answer to a prompt
    that is read by the model itself."""
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 12
    pair = ("--kv-predict", "smollm2-135m-0-21:keep=8")
    for arguments in ((text, "--max-tokens", 32, *pair), ("Write a story about a fox.", "--max-tokens", 96)):
        want = document(smollm2_gguf, *arguments, "--kv-cache", "int8")
        got = document(smollm2_gguf, *arguments, "--quantspec", "--num-draft-tokens", 4)
        assert got["token_ids"] == want["token_ids"]
        assert got["timings"]["quantspec"]["acceptance"] > 0.7
        if pair[0] in arguments:
            assert got["timings"]["kv_prediction"]["predicted_tokens"] > 100


def test_with_seeds(folder, tmp_path):
    """Seed-encoded weights draft for themselves; the prompt's planes come from a file."""
    from mlxeff.convert import convert

    convert(str(folder), tmp_path / "seeds", seedlm="4", data_free=True)
    stored = ("--prompt-cache", tmp_path / "cache.safetensors")
    arguments = (TEXT, "--raw", "--max-tokens", 30)
    want = document(tmp_path / "seeds", *arguments, "--kv-cache", "int8")
    for reused in (0, len(want["prompt_token_ids"]) - 1):
        got = document(tmp_path / "seeds", *arguments, *stored, "--quantspec", "--num-draft-tokens", 3)
        assert got["token_ids"] == want["token_ids"]
        assert got["timings"]["reused_tokens"] == reused
        assert got["timings"]["kv_dtype"] == "int8"


def test_ids_without_a_row_are_not_drafted(model):
    """A draft model with more rows than the model: the rows that only the draft has are left out."""
    config = CONFIG | SIZES | {"vocab_size": CONFIG["vocab_size"] + 64}
    wide = random_model(config, seed=4, scale=0.15)
    wide.use_native()
    drafter = ModelDraft(wide, vocabulary=model.vocab_size)
    for sampler in (make_sampler(), make_sampler(1.5)):
        drafted = drafter.propose(PROMPT, 7, model.new_cache(), sampler, ())
        assert max(drafted.tokens.tolist()) < model.vocab_size
    assert drafted.rows.shape == (7, model.vocab_size)
