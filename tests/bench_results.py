"""Made-up results of benchmarks with known medians: two arms, tests and five passes, as `mlxeff bench` writes them."""

import json
from statistics import fmean, median, stdev

METRICS = {"ttft_s": ("s", "lower"), "prompt_tps": ("tok/s", "higher"), "decode_tps": ("tok/s", "higher"),
           "peak_bytes": ("bytes", "lower"), "ppl": ("", "lower"), "kl": ("nats", "lower"),
           "gbps": ("GB/s", "higher"), "gflops": ("GFLOP/s", "higher")}  # fmt: skip
NOISE = (1.0, 0.992, 1.011, 1.004, 0.987)  # of the passes; their median is 1
ARMS = ("smollm2-135m", "kv-predict smollm2-135m-0-18")


def row(arm, test, metric, values, **more):
    """A row with the interval from the smallest to the largest of `values`."""
    unit, better = METRICS[metric]
    many = len(values) > 2
    numbers = {"count": len(values), "median": median(values), "mean": fmean(values), "min": min(values)}
    numbers |= {"max": max(values), "stddev": stdev(values) if len(values) > 1 else None, "p50": median(values)}
    numbers |= {"p90": None, "p99": None, "bytes_moved": None, "share_of_ceiling": None}
    numbers |= {"low": min(values) if many else None, "high": max(values) if many else None}
    place = {"arm": arm, "device": "cpu", "test": test, "metric": metric, "unit": unit, "better": better}
    return place | numbers | {"batch": 1} | more


def document(rows=(), samples=(), **parts):
    """A result of these rows."""
    card = {"cpu": "Intel(R) Xeon(R) Processor", "memory_gb": 25.3, "system": "Linux x86_64, Python 3.11.7",
            "mlxeff": "0.1.0", "mlx": "0.32.4", "cpu_backend": "native avx512", "threads": 2,
            "power": "mains", "thermal": None}  # fmt: skip
    settings = {"verb": "speed", "model": "smollm2-135m", "fingerprint": "1f2e3d4c", "rounds": 5, "warmup": 1,
                "device": "cpu", "prefill_step": {"cpu": 512}}  # fmt: skip
    arms = dict.fromkeys(each["arm"] for each in rows)
    whole = {"format": "mlxeff-bench", "version": 1, "card": card, "settings": settings}
    whole |= {"arms": {arm: {"parameters": 134515008, "weight_bytes": 115343360} for arm in arms}}
    whole |= {"ceilings": {}, "results": list(rows), "ratios": [], "published": [], "samples": list(samples)}
    return whole | {"skipped": [], "notices": []} | parts


def measured(arm, test, noise=NOISE, **metrics):
    """(rows, samples) of an arm at a test, whose medians are `metrics`; what is better by more is multiplied."""
    more = {name: metrics.pop(name) for name in ("batch", "tokens", "depth") if name in metrics}
    values = {name: [value * each for each in noise] for name, value in metrics.items()}
    rows = [row(arm, test, name, each, **more) for name, each in values.items()]
    samples = [
        {"arm": arm, "device": "cpu", "test": test, "round": index, "load_average": 0.2 + 0.1 * index}
        | {"values": {name: each[index] for name, each in values.items()}}
        for index in range(len(noise))
    ]
    return rows, samples


def realistic(arms=ARMS, speed=1.0, **parts):
    """Two arms: three prompt lengths, three depths, memory, perplexity, ratios and published numbers. `speed` divides
    the times of the second arm."""
    rows, samples = [], []
    for place, arm in enumerate(arms):
        factor = 1.9 * speed if place else 1.0
        for tokens in (128, 512, 2048):
            seconds = (0.0009 * tokens + 2.2e-7 * tokens**2) / factor
            noise = NOISE if tokens > 128 else (1.0, 0.97, 1.06, 1.02, 0.95)
            found = measured(arm, f"pp{tokens}", noise, ttft_s=seconds, prompt_tps=tokens / seconds, tokens=tokens,
                             depth=0)  # fmt: skip
            rows += found[0]
            samples += found[1]
        for depth in (0, 512, 2048):
            speed_here = 138 / (1 + depth / 3000) * (0.995 if place else 1)
            found = measured(arm, f"tg64 @ d{depth}", decode_tps=speed_here, tokens=64, depth=depth)
            found[0][0] |= {"bytes_moved": 115343360 + 30000 * depth, "share_of_ceiling": 0.71 - depth / 10000}
            rows += found[0]
            samples += found[1]
        rows.append(row(arm, "pp2048", "peak_bytes", [(0.41 + 0.07 * place) * 1e9], tokens=2048))
        rows.append(row(arm, "validation", "ppl", [14.91 + 0.6 * place]))
        rows.append(row(arm, "validation", "kl", [0.04 * place]))
    base = {(each["test"], each["metric"]): each for each in rows if each["arm"] == arms[0]}
    ratios = []
    for each in rows:
        against = base[each["test"], each["metric"]]
        if each["arm"] != arms[0] and against["median"]:
            ratio = each["median"] / against["median"]
            spread = (ratio * 0.985, ratio * 1.012) if each["count"] > 2 else (None, None)
            place = {name: each[name] for name in ("arm", "device", "test", "metric")}
            ratios.append(place | {"against": arms[0], "ratio": ratio, "low": spread[0], "high": spread[1]})
    common = {"test": "pp512", "unit": "×"}
    published = [
        common | {"what": "TTFT reduction of OE1.1B-KVP-C-450M", "arm": arms[-1], "metric": "ttft_reduction",
                  "ours": 1.9, "theirs": 1.76, "label": "published", "source": "arXiv 2410.08391, Table 5"},
        common | {"what": "TTFT of OpenELM 3B", "arm": "OE3B", "test": "pp1024", "metric": "ttft_s", "unit": "s",
                  "ours": None, "theirs": 4.8, "label": "reconstructed", "source": "arXiv 2410.08391, Figure 1"},
    ]  # fmt: skip
    given = {"ratios": ratios, "published": published}
    given["ceilings"] = {"cpu": {"read_gbps": 21.4, "gflops": 310.5, "how": "a loop that reads 256 MB, 5 passes"}}
    given["skipped"] = ["smollm2-135m, batch 64 x 2048 tokens on cpu: needs about 26.1 GB, 21.5 GB may be used"]
    given["notices"] = ["the load average was 1.4 before a pass of pp128"]
    return document(rows, samples, **given | parts)


def write(path, whole):
    """Write a result to `path`; returns the path."""
    path.write_text(json.dumps(whole))
    return path
