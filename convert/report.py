"""What a conversion did, or in a dry run would do; as lines to print or as a dict for JSON. Computes nothing."""

from dataclasses import asdict, dataclass

from ..errors import some

SHOWN = 20  # differences listed one by one


@dataclass
class Report:
    """Sizes in bytes. `changes` are (tensor, shape, dtype before, dtype after), `wrong_shape` (tensor, the model's, the
    source's shape)."""

    source: str
    destination: str
    family: str
    model_type: str
    options: dict
    parameters: int
    tensors: int
    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[tuple[str, tuple, tuple]]
    dropped: dict[str, str]
    changes: list[tuple[str, tuple, str, str]]
    source_bytes: int
    disk_bytes: int
    free_bytes: int
    peak_bytes: int
    shards: int
    tokenizer: list[str]
    written: bool
    encoding: dict | None = None  # of SeedLM: modules, weights, bits_per_weight, kept, encoder, errors by module

    @property
    def ok(self) -> bool:
        """True if every tensor of the model is there, of its shape, and no other."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def as_dict(self) -> dict:
        """Everything, of JSON types."""
        return asdict(self) | {"ok": self.ok}

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        verb = "converted" if self.written else "would convert"
        options = ", ".join(f"{key} {value}" for key, value in self.options.items() if value is not None) or "as stored"
        count = f"{self.parameters:,} parameters in {self.tensors} tensors"
        disk = f"{_mib(self.disk_bytes)} in {self.shards} file(s), from {_mib(self.source_bytes)}"
        return [
            f"{verb} {self.source} -> {self.destination}",
            f"model      {self.model_type} ({self.family}), {count}, {options}",
            *self._differences(),
            *(f"dropped    {name}: {reason}" for name, reason in self.dropped.items()),
            *self._changes(),
            *self._encoding(),
            f"disk       {disk}; {_mib(self.free_bytes)} free",
            f"memory     about {_mib(self.peak_bytes)} for the largest tensor, beside the program",
            f"tokenizer  {', '.join(self.tokenizer) if self.tokenizer else 'not found: name one with --tokenizer'}",
        ]

    def _differences(self) -> list[str]:
        lines = [f"missing    {name}" for name in self.missing[:SHOWN]]
        lines += [f"unexpected {name}" for name in self.unexpected[:SHOWN]]
        lines += [f"shape      {name}: wanted {own}, got {got}" for name, own, got in self.wrong_shape[:SHOWN]]
        hidden = sum(max(0, len(found) - SHOWN) for found in (self.missing, self.unexpected, self.wrong_shape))
        return (
            [*lines, f"           and {hidden} more differences"]
            if hidden
            else lines or ["tensors    all present, all of their shape"]
        )

    def _encoding(self) -> list[str]:
        if self.encoding is None:
            return []
        e = self.encoding
        kept = [f"{name} ({how})" for name, how in e["kept"].items()] or ["nothing quantised"]
        lines = [
            f"seedlm     {e['modules']} modules, {e['weights']:,} weights, {e['bits_per_weight']:.3f} bits a weight",
            f"kept       {some(kept)}",
        ]
        if e["encoder"]:
            lines.append(f"encoder    {e['encoder']}")
        if e["errors"]:
            worst = max(e["errors"], key=e["errors"].get)
            mean = sum(e["errors"].values()) / len(e["errors"])
            lines.append(f"error      {mean:.4f} relative, mean over modules; worst {worst} {e['errors'][worst]:.4f}")
        return lines

    def _changes(self) -> list[str]:
        counts = {}
        for _, _, before, after in self.changes:
            counts[before, after] = counts.get((before, after), 0) + 1
        return [f"dtype      {before} -> {after}: {count} tensors" for (before, after), count in sorted(counts.items())]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
