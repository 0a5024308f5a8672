"""Where the bytes of a compressed model went, and what they cost: one drawing of a report."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from compress.errors import CompressError
from compress.report import ModuleReport, Report, balance

_FORMATS = ("png", "svg", "pdf")


def draw(report: Report, file: Path) -> None:
    """Bytes, bits per weight and output error of every matrix over the blocks, a line for each kind of matrix; the mark
    tells the form it has.

    Raises:
        CompressError: a file name that says no format we draw.
    """
    if file.suffix.removeprefix(".").lower() not in _FORMATS:
        raise CompressError(f"--plot {file}: the name must end in {', '.join(f'.{name}' for name in _FORMATS)}")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    leaves: dict[str, list[tuple[int, ModuleReport]]] = defaultdict(list)
    for module in report.modules:
        block = re.search(r"\.(\d+)\.", module.name)
        leaves[module.name.rpartition(".")[2]].append((int(block[1]) if block else 0, module))
    forms = sorted({_form(module) for module in report.modules})
    marks = dict(zip(forms, "os^Dv*PX" * len(forms), strict=False))
    figure, axes = pyplot.subplots(3, 1, figsize=(10, 11), sharex=True, layout="constrained")
    values = (
        (axes[0], "MB", lambda m: m.packed_bytes / 1e6),
        (axes[1], "bits per weight", lambda m: m.bits_per_weight),
        (axes[2], "relative output error", lambda m: m.error),
    )
    for axis, label, value in values:
        for color, (leaf, modules) in enumerate(leaves.items()):
            shown = [(block, value(module), module) for block, module in modules if value(module) is not None]
            axis.plot(
                [s[0] for s in shown],
                [s[1] for s in shown],
                color=f"C{color}",
                lw=1,
                label=leaf if axis is axes[0] else None,
            )
            for form, mark in marks.items():
                of_form = [s for s in shown if _form(s[2]) == form]
                axis.scatter([s[0] for s in of_form], [s[1] for s in of_form], color=f"C{color}", marker=mark, s=22)
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    for form, mark in marks.items():
        axes[2].scatter([], [], color="0.3", marker=mark, s=22, label=form)
    axes[0].legend(ncols=4, fontsize="small")
    axes[2].legend(ncols=3, fontsize="small")
    axes[2].set_xlabel("block")
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    summary = report.summary()
    size = f"{summary['packed_bytes'] / 1e6:.1f} MB, {summary['bits_per_weight']:.2f} bits per weight"
    axes[0].set_title(f"{Path(report.model).name}: {size}")
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _form(module: ModuleReport) -> str:
    spec = module.spec
    if spec["format"] != "sparse_dictionary":
        return spec["format"]
    kind = "learned" if not spec["unit_atoms"] else "identity+learned" if spec["num_atoms"] else "identity"
    return kind + balance(spec) + (f", {spec['value_bits']} bits" if spec["value_bits"] < 16 else "")
