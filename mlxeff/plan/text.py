"""The document of `mlxeff plan` as tables for people. Every line with predicted numbers says so."""

from .formats import AS_STORED, QUALITY

Bar = dict


def plan(document: dict) -> str:
    """The whole plan."""
    parts = [_head(document), _weights(document), _memory(document), _caches(document), _drafts(document)]
    parts += [_others(document), _choice(document), _layers(document)]
    return "\n\n".join(part for part in parts if part)


def _head(document: dict) -> str:
    machine, shape, known = document["machine"], document["shape"], document["constants"]
    rates = f"{machine['bandwidth_gbs']:g} GB/s, {machine['tflops']:g} TFLOP/s"
    if machine["accelerated_tflops"]:
        rates += f", {machine['accelerated_tflops']:g} with accelerators"
    memory = f"{machine['memory_gb']:g} GB of memory, of which a model may take {machine['usable_gb']:g}"
    context = f", context {shape['context']}" if shape["context"] else ""
    errors = f"prefill ±{known['prefill_error']:.0%}, decode ±{known['decode_error']:.0%}"
    weights = f"{shape['parameters'] / 1e9:.3g} billion weights of {shape['bits']:.3g} bits"
    active = f"{shape['active_weights'] / 1e9:.3g} billion read for a token"
    return "\n".join(
        [
            f"model      {document['model']}: {weights}, {active}, {shape['layers']} layers{context}",
            f"machine    {machine['name']}: {rates}, {memory}",
            f"constants  {document['engine']}, {known['source']}; {errors}",
            "All numbers are predicted; a number in brackets is the end of its error bar that is worse.",
        ]
    )


def _plain(document: dict, **chosen) -> list[dict]:
    """The combinations with these values, and without techniques that are not named."""
    cache = document["combinations"][0]["kv_cache"]
    sensitivity = max(each["sensitivity"] for each in document["combinations"])
    default = {"kv_cache": cache, "quantspec": False, "sensitivity": sensitivity, "kv_predict_layers": None}
    wanted = default | chosen
    return [each for each in document["combinations"] if wanted.items() <= each.items()]


def _row(each: dict) -> list[str]:
    fits = {True: "yes", False: "NO", None: "?"}[each["fits"]]
    cells = [f"{each['peak_bytes'] / 1e9:.2f} GB", fits]
    cells += [f"{bar['s']:.3g} ({bar['high']:.3g})" for bar in each["ttft"]]
    return cells + [f"{bar['tps']:.3g} ({bar['low']:.3g})" for bar in each["decode"]]


def _header(document: dict, first: str) -> list[str]:
    one = document["combinations"][0]
    ttft = [f"TTFT {bar['tokens']}, s" for bar in one["ttft"]]
    return [first, "memory", "fits", *ttft, *(f"tok/s @{bar['depth']}" for bar in one["decode"])]


def _weights(document: dict) -> str:
    cache = document["combinations"][0]["kv_cache"]
    rows = [[each["weights"], *_row(each)] for each in _plain(document)]
    return aligned([_header(document, f"predicted: weights, {cache} KV"), *rows])


def _memory(document: dict) -> str:
    """Weights, cache and peak by the prefill step, with the first kind of cache."""
    cache, rows = document["memory"][0]["kv_cache"], []
    for each in document["memory"]:
        if each["kv_cache"] == cache:
            peaks = [f"{value / 1e9:.2f}" for value in each["peak_bytes_by_step"].values()]
            most = "?" if each["most_context"] is None else str(each["most_context"])
            sizes = [f"{each[name] / 1e9:.2f}" for name in ("weight_bytes", "kv_bytes")]
            rows.append([each["weights"], *sizes, *peaks, most])
    steps = [f"peak, step {step}" for step in document["memory"][0]["peak_bytes_by_step"]]
    longest = document["combinations"][0]["ttft"][-1]["tokens"]
    head = [f"predicted: GB, prompt of {longest}", "weights", f"{cache} KV", *steps, "most tokens"]
    return aligned([head, *rows])


def _caches(document: dict) -> str:
    """Kinds of cache and QuantSpec with the first way to store weights."""
    name = document["combinations"][0]["weights"]
    rows = []
    for cache in dict.fromkeys(each["kv_cache"] for each in document["combinations"]):
        rows += [[cache, *_row(each)] for each in _plain(document, weights=name, kv_cache=cache)]
        drafted = _plain(document, weights=name, kv_cache=cache, quantspec=True)
        rows += [[f"{cache} + quantspec", *_row(each)] for each in drafted]
    return aligned([_header(document, f"predicted: KV cache, weights {name}"), *rows])


def _drafts(document: dict) -> str:
    rows = [
        [
            f"{each['weights']} @{each['depth']}",
            str(each["draft_tokens"]),
            f"{each['speedup']:.2f} ({each['low']:.2f} to {each['high']:.2f})",
            {True: "yes", False: "no", None: "unclear"}[each["pays"]],
            "never" if each["break_even_acceptance"] is None else f"{each['break_even_acceptance']:.2f}",
        ]
        for each in document["quantspec"]
    ]
    if not rows:
        return ""
    head = f"predicted: QuantSpec, accepted {document['quantspec'][0]['acceptance']:g}"
    return aligned([[head, "best draft", "speedup over int8", "pays", "pays from acceptance"], *rows])


def _others(document: dict) -> str:
    """DynaMoE and KV Prediction with the first way to store weights."""
    name = document["combinations"][0]["weights"]
    rows = []
    shares = dict.fromkeys(each["sensitivity"] for each in document["combinations"])
    counts = dict.fromkeys(each["kv_predict_layers"] for each in document["combinations"])
    for share in shares:
        rows += [[f"sensitivity {share:g}", *_row(each)] for each in _plain(document, weights=name, sensitivity=share)]
    for count in filter(None, counts):
        found = _plain(document, weights=name, kv_predict_layers=count)
        rows += [[f"KV Prediction, first {count} layers", *_row(each)] for each in found]
    return aligned([_header(document, f"predicted: techniques, weights {name}"), *rows])


def _choice(document: dict) -> str:
    """Which weights to take: the fastest that fit, and what is known of their quality."""
    fitting = [each for each in _plain(document) if each["fits"] is not False]
    if not fitting:
        return "Nothing fits: see --memory, or a smaller model."
    best = max(fitting, key=lambda each: each["decode"][0]["tps"])
    lines = [f"Fastest that fits (predicted): {best['weights']}, {best['decode'][0]['tps']:.3g} tok/s."]
    known = {name: kl for name, kl in QUALITY.items() if any(each["weights"] == name for each in fitting)}
    if known and best["weights"] != AS_STORED:
        values = ", ".join(f"{name} {kl:g}" for name, kl in known.items())
        lines.append(f"What rounding costs is not predicted. Measured on SmolLM2-135M, KL divergence: {values}.")
    return "\n".join(lines)


def _layers(document: dict) -> str:
    if document["layers"] is None:
        return ""
    deepest = document["combinations"][0]["decode"][-1]["depth"]
    rows = [
        [
            str(each["layer"]),
            str(each["window"] or "all"),
            f"{each['weights']}",
            f"{each['read_bytes']}",
            f"{each['kv_bytes_per_token']:g}",
            f"{each['product_flops']}",
            f"{each['attention_flops']}",
        ]
        for each in document["layers"]
    ]
    head = ["layer", "attends", "weights", "bytes read", "KV bytes a token (16 bits)", "FLOPs of products"]
    return aligned([[*head, f"FLOPs of attention @{deepest}"], *rows])


def score(document: dict) -> str:
    """The result of --calibrate or --score."""
    found = document.get("calibrated") or document["score"]
    rows = [["point", "measured, ms", "predicted, ms", "error of the speed"]]
    for each in found["points"]:
        times = [f"{1e3 * each[name]:.4g}" for name in ("measured_s", "predicted_s")]
        rows.append([f"{each['phase']}, {each['tokens']} tokens", *times, f"{each['error']:+.1%}"])
    means = ", ".join(f"{name} {value:.1%}" for name, value in found["mape"].items() if value is not None)
    lines = [aligned(rows), f"mean absolute error: {means} (constants: {found['source']})"]
    if "kept" in found:
        lines.append(f"kept in {found['kept']}: `mlxeff plan MODEL` uses them for this machine")
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> str:
    """Rows as columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
