"""The report of a conversion, or of a dry run of one: lines of text, or a dict for JSON. It computes nothing."""

from dataclasses import asdict, dataclass

from ..errors import some

SHOWN = 20  # how many differences of each kind are listed one by one


@dataclass
class Report:
    """The facts of a conversion. Fields that end with `bytes` are sizes in bytes; `peak_bytes` is the memory for the
    weight that needs the most. The differences between source and model are described in `plan.Conversion`."""

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
    encoding: dict | None = None  # `seedlm.Choice.report`; None without SeedLM

    @property
    def ok(self) -> bool:
        """Whether the source has exactly the tensors of the model, in their shapes."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def as_dict(self) -> dict:
        """All fields and `ok`, in types that JSON has."""
        return asdict(self) | {"ok": self.ok}

    def lines(self) -> list[str]:
        """The report as lines of text, one fact on each line."""
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
