"""`mlxeff fit`: a technique's learned part, fitted to a model here. `kv-predictor` makes a pair of KV Prediction."""

import argparse
import itertools
import json
import time
from pathlib import Path

from ..errors import MlxeffError, notices
from . import output

TRAINING = {"batch": 1, "rate": 3e-4, "continuation": 64, "rank": 16, "aux_loss": 1.0}  # defaults
SEARCH_PIECES = 4  # of the text, to compare choices of layers on


def run(options: argparse.Namespace) -> int:
    with output.show_notices(options.quiet) as lines:
        report = _kv_predictor(options)
    if options.json:
        print(json.dumps(report | {"notices": lines}, indent=2, ensure_ascii=False))
    elif not options.quiet:
        if report["losses"]:
            print(f"training: loss {report['losses'][0]:.3f} at first, {report['losses'][-1]:.3f} at last")
        scheme = report["quantization"]
        maps = "{bits} bits in groups of {group_size}".format(**scheme) if scheme else "float16"
        print(
            f"{report['pair']}: fitted on {report['tokens']} tokens in {report['seconds']:.1f} s, unexplained variance "
            f"{report['error']:.3f}, maps of {maps}, "
            f"FLOPs to the first token of 512 {report['flops_ratio']:.2f} of the base's"
        )
    return 0


def _kv_predictor(options: argparse.Namespace) -> dict:
    from .. import hub, kernels
    from ..checkpoint import check_new
    from ..kv_pairs import SEAM, make_auxiliary
    from ..kvprediction.files import PairConfig, write_pair
    from ..kvprediction.predictor import quantize
    from ..loading import load_path, require_seam

    check_new(Path(options.out))
    _fill_in(options)
    _check(options)
    kernels.use_device(options.device)
    with output.bar(f"fetching {options.base}", "B", options.quiet) as progress:
        path = hub.resolve(options.base, offline=options.offline, progress=progress)
    base, began = load_path(path), time.perf_counter()
    require_seam(base.model, SEAM, "KV prediction")
    # What can be refused at once comes before what takes minutes.
    given = _training_text(options, base) if options.train_text is not None else None
    searched = options.aux.startswith("search:")
    auxiliary = None if searched else make_auxiliary(options.aux, base, options.offline)
    scheme = auxiliary and _quantization(options, auxiliary.model)
    pieces = _sequences(options, base)
    if searched:
        auxiliary = make_auxiliary(_found(options, base.model, pieces), base)
        scheme = _quantization(options, auxiliary.model)
    fitted, losses, tuned = _fit(options, auxiliary, base, pieces, given)
    if scheme:
        quantize(fitted.predictor, scheme)
    config = PairConfig(
        base={"name": options.base, "fingerprint": base.fingerprint},
        auxiliary=auxiliary.config | ({"tuned": tuned.config} if tuned else {}),
        layer_map=fitted.predictor.layer_map,
        inputs=options.inputs,
        shared=fitted.predictor.shared,
        quantization=scheme,
        provenance=_provenance(options, fitted, losses),
    )

    def describe(partial: Path) -> PairConfig:
        if losses:
            _plot(losses, partial / "loss.png")
        return config

    write_pair(Path(options.out), describe, fitted.predictor, tuned=tuned, half=True)
    if losses:
        _state(options).unlink(missing_ok=True)
    if tuned:
        tuned.fold()
    return {
        "pair": options.out,
        "base": config.base,
        "auxiliary": config.auxiliary,
        "layer_map": config.layer_map,
        "quantization": scheme,
        "tokens": fitted.tokens,
        "seconds": time.perf_counter() - began,
        "error": fitted.error,
        "errors": fitted.errors,
        "losses": losses,
        **_sizes(base.model, auxiliary.model, fitted.predictor),
    }


def _fill_in(options: argparse.Namespace) -> None:
    """The defaults of the training's options; refuses those that would be ignored."""
    needs = {
        "batch": ("--steps", options.steps),
        "rate": ("--steps", options.steps),
        "continuation": ("--loss distill", options.loss == "distill"),
        "rank": ("--train lora", options.train == "lora"),
        "aux_loss": ("--train lora or full", options.train != "predictor"),
    }
    for name, (wanted, met) in needs.items():
        given = getattr(options, name)
        if given is not None and not met:
            raise MlxeffError(f"--{name.replace('_', '-')} {given}: wanted {wanted}, got none")
        if given is None:
            setattr(options, name, TRAINING[name])


def _check(options: argparse.Namespace) -> None:
    """Refuse contradictions."""
    if options.per_head and options.inputs != "own":
        raise MlxeffError(f"--per-head: wanted --inputs own, which have heads, got {options.inputs}")
    for name in ("ridge", "rate", "aux_loss"):
        if not getattr(options, name) >= 0:
            raise MlxeffError(f"--{name.replace('_', '-')}: wanted 0 or more, got {getattr(options, name)}")
    if options.train != "predictor" and not options.steps:
        raise MlxeffError(f"--train {options.train}: wanted --steps of 1 or more, got none")
    if options.loss == "distill" and not options.steps:
        raise MlxeffError("--loss distill: wanted --steps of 1 or more, got none")
    if options.train_text is not None and not options.steps:
        raise MlxeffError(f"--train-text {options.train_text}: wanted --steps of 1 or more, got none")
    if options.prompt_mark is not None and (options.loss != "distill" or not options.train_text):
        got = f"{options.loss}, {options.train_text or 'none'}"
        raise MlxeffError(f"--prompt-mark: wanted --loss distill and a --train-text, got {got}")


def _found(options: argparse.Namespace, base, pieces: list[list[int]]) -> str:
    """The auxiliary of `search:FRACTION`: the layers with the least error on the first pieces."""
    from ..kvprediction.fit import choose_layers
    from ..kvprediction.layers import candidates

    choices = candidates(options.aux.partition(":")[2], len(base.layers))
    best, errors = choose_layers(base, choices, pieces[:SEARCH_PIECES], options.ridge, options.inputs)
    for layers, error in zip(choices, errors, strict=True):
        notices.info("fit: layers %s: unexplained variance %.3f", ",".join(map(str, layers)), error)
    return "layers:" + ",".join(map(str, best))


def _quantization(options: argparse.Namespace, auxiliary) -> dict | None:
    """The scheme that `--map-bits` asks for; refused here, before the fit, where it does not divide what maps read."""
    from ..kvprediction.predictor import quantization, read_widths

    if options.map_bits is None:
        return None
    return quantization(options.map_bits, read_widths(auxiliary.kv_shapes, options.inputs, auxiliary.hidden_size))


def _fit(options: argparse.Namespace, auxiliary, base, pieces: list[list[int]], given: tuple | None):
    """(the closed form, perhaps trained on from there; the losses of the training; what was tuned of the auxiliary)."""
    from ..kvprediction.fit import fit
    from ..kvprediction.train import Training, check, train
    from ..kvprediction.tuning import Tuned

    training, ends = given or (pieces, [])
    settings = Training(
        options.steps,
        options.batch,
        options.rate,
        loss=options.loss,
        continuation=options.continuation,
        auxiliary_loss=options.aux_loss,
        seed=options.seed,
    )
    if options.steps:
        check(training, settings)  # before the closed form, which takes minutes
    models, how = (auxiliary.model, base.model), (options.ridge, options.per_head, options.search, options.inputs)
    with output.bar("fitting", "tok", options.quiet) as progress:
        fitted = fit(*models, auxiliary.layer_map, _counted(pieces, progress), *how, shared=_shared(options, auxiliary))
    if not options.steps:
        return fitted, [], None
    tuned = None
    if options.train != "predictor":
        tuned = Tuned(auxiliary.model, options.train, options.rank, options.seed)
    with output.bar("training", "step", options.quiet) as progress:
        losses = train(fitted.predictor, *models, training, settings, _state(options), progress, tuned, ends)
    return fitted, losses, tuned


def _training_text(options: argparse.Namespace, base) -> tuple[list[list[int]], list[int]]:
    """(pieces of `--train-text`; where prompts end in them, one after the other); refuses a text without the mark, or
    with nothing else."""
    tokenizer, text, mark = base.tokenizer, _read(options.train_text), options.prompt_mark
    parts = [_tokens(part, tokenizer) for part in (text.split(mark) if mark else [text])]
    if mark and len(parts) == 1:
        raise MlxeffError(f"{options.train_text}: wanted {mark!r} where prompts end, got a text without it")
    ids, ends = list(itertools.chain(*parts)), list(itertools.accumulate(map(len, parts[:-1])))
    if not ids:
        raise MlxeffError(f"{options.train_text}: wanted text to train on, got none")
    pieces, before = _pieces(ids, options.length, tokenizer)
    # A piece may begin with more than its own tokens.
    ends = [end + before * (1 + end // (len(pieces[0]) - before)) for end in ends]
    if mark:
        notices.info("fit: %d prompts in %s", len(ends), options.train_text)
    return pieces, ends


def _shared(options: argparse.Namespace, auxiliary) -> int:
    """How many first layers auxiliary and base have in common, also after the training."""
    from ..kvprediction.layers import shared_layers

    return shared_layers(auxiliary.config.get("layers", ())) if options.train == "predictor" else 0


def _plot(losses: list[float], path: Path) -> None:
    """The loss of each step and its running mean as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        notices.warning("%s: not drawn: matplotlib is missing (pip install 'mlxeff[benchmarks]')", path.name)
        return
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.5, alpha=0.5, label="loss of a step")
    width = max(1, len(losses) // 50)
    sums = list(itertools.accumulate(losses, initial=0.0))
    means = [(sums[i + width] - sums[i]) / width for i in range(len(losses) - width + 1)]
    axes.plot(range(width, len(losses) + 1), means, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def _state(options: argparse.Namespace) -> Path:
    """Where an unfinished training is kept: the same command goes on from there."""
    out = Path(options.out)
    return out.with_name(f"{out.name}.training")


def _provenance(options: argparse.Namespace, fitted, losses: list[float]) -> dict:
    kept = (
        "ridge",
        "per_head",
        "search",
        "inputs",
        "length",
        "seed",
        "steps",
        "batch",
        "rate",
        "train",
        "loss",
        "continuation",
        "prompt_mark",
        "rank",
        "aux_loss",
    )
    return {
        "method": "ridge, then gradient training" if losses else "ridge",
        "text": options.text and Path(options.text).name,
        "train_text": options.train_text and Path(options.train_text).name,
        **{key: getattr(options, key) for key in kept},
        "tokens": fitted.tokens,
        "errors": fitted.errors,  # of the closed form
        "losses": losses,
    }


def _sizes(base, auxiliary, predictor) -> dict:
    """Parameter counts, and the FLOPs to the first token of 512 as a share of the base's."""
    from ..kvprediction.flops import parameters, ttft_flops

    sizes = [parameters(each) for each in (base, auxiliary, predictor)]
    counts = dict(zip(("base", "auxiliary", "predictor"), sizes, strict=True))
    return {"parameters": counts, "flops_ratio": ttft_flops(*sizes, 512) / (2 * sizes[0] * 512)}


def _sequences(options: argparse.Namespace, base) -> list[list[int]]:
    """Pieces of the text, or of what the base writes, as the models read them: each begins with a BOS if the tokenizer
    adds one."""
    if options.text is None:
        from ..kvprediction.text import sample

        start = base.tokenizer.bos_token_id
        if start is None:
            raise MlxeffError(f"{options.base}: wanted a token that text begins with (BOS), got none: name a --text")
        notices.info("fit: no --text: the base writes %d tokens itself", options.tokens)
        return sample(base.model, start, options.tokens, options.length, options.seed)
    ids = _tokens(_read(options.text), base.tokenizer)
    if len(ids) < options.tokens:
        notices.warning("%s: %d tokens, fewer than --tokens %d", options.text, len(ids), options.tokens)
    return _pieces(ids[: options.tokens], options.length, base.tokenizer)[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxeffError(f"{path}: wanted UTF-8 text: {error}") from error


def _tokens(text: str, tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _pieces(ids: list[int], length: int, tokenizer) -> tuple[list[list[int]], int]:
    """(pieces of at most `length` tokens; how many of these the tokenizer puts before each)."""
    start = tokenizer.encode("", add_special_tokens=True)
    step = max(1, length - len(start))
    return [start + ids[at : at + step] for at in range(0, len(ids), step)], len(start)


def _counted(pieces: list[list[int]], progress):
    total, done = sum(map(len, pieces)), 0
    for piece in pieces:
        yield piece
        done += len(piece)
        if progress:
            progress(done, total)
