"""Results as Markdown, which reads well on a screen too."""

from .growth import exponents

MEMORY = {
    "cuda": "Memory: most that torch held on the GPU, real images and networks included.",
    "cpu": "Memory: most that was resident during the steps, above what was resident just before the first.",
}


def markdown(content: dict) -> str:
    """The tables of what was measured, under one line that says where."""
    hardware, recipe = content["hardware"], content["recipe"]
    lines = [
        f"# Engine benchmark, {content['date']}",
        "",
        f"{hardware['name']}, {hardware['threads']} threads, torch {content['versions']['torch']}, "
        f"{content['shape']}, T = {recipe['distill']['frequencies']}, ConvNet of width "
        f"{recipe['network']['width']}. Median (min to max) of {content['flags']['rounds']} rounds. "
        f"{MEMORY[hardware['kind']]}",
    ]
    for part in (_comparison, _growth, _profile, _pretrain):
        lines += part(content)
    return "\n".join(lines) + "\n"


def _comparison(content: dict) -> list[str]:
    rows = [
        (row["ipc"], row["contender"], _seconds(row), _mib(row), f"{row['images_per_second']:,.0f}")
        for row in content["comparison"]
    ]
    ratios = [
        (
            row["ipc"],
            row["ratio"],
            f"{row['numerator']:.4g}",
            f"{row['denominator']:.4g}",
            f"{row['value']:.2f}",
        )
        for row in content["ratios"]
    ]
    head = ("ipc", "contender", "seconds per iteration", "peak MiB", "images per second")
    lines = ["", *_table(head, rows)] if rows else []
    if ratios:
        lines += ["", *_table(("ipc", "ratio", "numerator, s", "denominator, s", "times"), ratios)]
    if content["agreement"]:
        apart = ", ".join(f"{name} {value:.1e}" for name, value in content["agreement"].items())
        lines += ["", f"Engine and loop on the same step, largest relative difference of a class: {apart}."]
    return lines


def _growth(content: dict) -> list[str]:
    if "growth" not in content:
        return []
    rows = [
        (row["axis"], row["value"], _seconds(row), "" if slope is None else f"{slope:.2f}", _mib(row))
        for row, slope in zip(content["growth"], exponents(content["growth"]), strict=True)
    ]
    head = ("axis", "value", "seconds per iteration", "exponent", "peak MiB")
    notes = (
        f"The engine alone on random images; one number at a time differs from {_base(content)}. "
        "Exponent: 1 is in proportion to the axis, for sizes to the pixels."
    )
    if any(row["axis"] == "ranks" for row in content["growth"]):
        notes += " Ranks on one CPU share its threads; the memory is that of the largest."
    return ["", *_table(head, rows), "", notes]


def _base(content: dict) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in content["base"].items())


def _profile(content: dict) -> list[str]:
    if "profile" not in content:
        return []
    found = content["profile"]
    shares = [(name, f"{100 * share:.1f} %") for name, share in found["shares"].items()]
    limits = [
        (
            name,
            f"{rate / 1e12:.3g}",
            f"{found['limit_seconds'][name]:.4g}",
            # More than all of it: this device has no units for the precision, and the step does not use it.
            f"{100 * fraction:.1f} %" if (fraction := found["fraction"][name]) <= 1 else "-",
        )
        for name, rate in found["rates"].items()
    ]
    return [
        "",
        *_table(("kind of operation", "share of time"), shares),
        "",
        f"{found['operations'] / 1e9:,.1f} GFLOP of convolutions and matrix products in an iteration of "
        f"{found['seconds']:.4g} s, at ipc {content['recipe']['ipc']}.",
        "",
        *_table(("matrix products", "TFLOP/s here", "limit, s", "of the limit"), limits),
    ]


def _pretrain(content: dict) -> list[str]:
    if "pretrain" not in content:
        return []
    row = content["pretrain"]
    return [
        "",
        f"Pretraining {row['networks']} networks for {row['epochs']} epochs of {row['images']:,} images: "
        f"{row['seconds']:.4g} s, {row['network_epochs_per_second']:.4g} network-epochs per second.",
    ]


def _seconds(row: dict) -> str:
    return f"{row['median']:.4g} ({row['min']:.4g} to {row['max']:.4g})"


def _mib(row: dict) -> str:
    return f"{row['peak_mib']:,.0f}"


def _table(head: tuple, rows: list[tuple]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
