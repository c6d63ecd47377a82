"""Lines that show a published number beside ours, with where it comes from and how sure that is."""

# How sure a number is: read in the publication; rebuilt from what it says; quoted by others; not known.
LABELS = ("published", "reconstructed", "recalled", "unknown")


def line(
    what: str,
    arm: str,
    test: str,
    metric: str,
    unit: str,
    ours: float | None,
    theirs: float | str | None,
    source: str,
    label: str = "published",
    device: str | None = None,
) -> dict:
    """A line: what is compared, our arm, test, metric and value (None: not measured), the published value (a number; a
    text for a range; None: not printed), `label` of LABELS, and the publication with its table or figure."""
    assert label in LABELS, label
    found = {"what": what, "arm": arm, "device": device, "test": test, "metric": metric, "unit": unit}
    return found | {"ours": ours, "theirs": theirs, "label": label, "source": source}
