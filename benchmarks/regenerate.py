"""Write every generated table of README.md and RESULTS.md again from committed results. Measures nothing.

    python benchmarks/regenerate.py [SECTION ...]      # or: make bench

Without a SECTION all are written. The section cpu-peers takes a minute: it counts the bytes of the models that were
measured, which are fetched where they are missing.
"""

import argparse
import subprocess
import sys

from places import RESULTS

HERE = RESULTS.parent
# Section of RESULTS.md → (script, result that it shows).
SECTIONS = {
    "cpu-peers": ("cpu_peers", "Intel-Xeon-Processor-cpu-peers-mlx-0.32.4"),
    "cpu-decode-profile": ("cpu_decode_profile", "Intel-Xeon-Processor-2-80GHz-cpu-decode-profile"),
    "gguf-quality": ("gguf_quality", "AMD-EPYC-gguf-quality"),
    "kv-cache": ("kv_cache", "AMD-EPYC-kv-cache"),
    "kv-memory": ("kv_memory", "AMD-EPYC-kv-memory"),
    "kv-peers": ("kv_peers", "AMD-EPYC-kv-peers"),
    "kv-codecs": ("kv_codecs", "AMD-EPYC-kv-codecs"),
    "speculation": ("speculation", "AMD-EPYC-speculation"),
    "quantspec-prediction": ("quantspec_prediction", "predicted-M1-to-M4-quantspec"),
    "plan-score": ("plan_score", "published-M1-to-M5-plan-score"),
    "seedlm-quality": ("seedlm_quality", "Intel-Xeon-Processor-seedlm-quality"),
    "kvp-quality": ("kvp_quality", "Intel-Xeon-Processor-kvp-quality"),
    "dynamoe": ("dynamoe", "Intel-Xeon-Processor-2-80GHz-dynamoe"),
}
SUMMARY = "summary"  # the table of the README, and the sections that have no script of their own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", choices=[*SECTIONS, SUMMARY, []], help="default: all")
    for name in parser.parse_args().sections or [*SECTIONS, SUMMARY]:
        if not _run(name):
            sys.exit(f"{name}: failed")
        print(f"{name}: written", file=sys.stderr)


def _run(name: str) -> bool:
    """Write a section; returns whether that succeeded. What the script prints is shown only where it failed."""
    script, result = SECTIONS.get(name, (SUMMARY, None))
    report = ["--report", str(RESULTS / f"{result}.json")] if result else []
    done = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *report], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    main()
