"""Tables of models that were trained with several seeds, and of ablations beside the paper's."""

from collections.abc import Mapping, Sequence
from typing import Any

from retro_jax.evaluate.conditions import condition_name
from retro_jax.evaluate.seeds import spread
from retro_jax.report import published
from retro_jax.report.tables import excludes_zero, interval
from retro_jax.report.views import Table

_PAIR = "ablated-whole"
_PAPER = (
    ' The paper\'s differences are of C4 at 247M parameters. "not clear": the interval holds 0.'
)
_OF_SEEDS = (
    "Bits per byte of RETRO[ON], the mean of {} seeds ± their standard deviation, each beside the RETRO of the"
    " same seed. In brackets: 95%, resamples of documents and seeds." + _PAPER
)
_OF_ONE = (
    "Bits per byte of RETRO[ON], each trained once, like the RETRO that it is compared with. In brackets: 95%,"
    " resamples of documents; another seed may differ by more." + _PAPER
)


def seed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Figures of several seeds, as retro_jax.evaluate.seeds gives them."""
    names = list(rows[0]["bits_per_byte"])
    pairs = list(rows[0]["differences"])
    shown = [" - ".join(map(condition_name, pair.split("-"))) for pair in pairs]
    header = ["corpus", "r(C)", "chunks", *map(condition_name, names)]
    header += [cell for name in shown for cell in (name, "of each seed")]
    lines = []
    for row in rows:
        cells = [row["corpus"] or "all", f"<= {row['at_most']:.0%}", f"{row['chunks']:,}"]
        cells += [_with_spread(figure) for figure in row["bits_per_byte"].values()]
        for figure in row["differences"].values():
            cells += [interval(figure, "+"), _of_each(figure)]
        lines.append(cells)
    count = len(rows[0]["bits_per_byte"][names[0]]["seeds"])
    caption = (
        f"Bits per byte, the mean of {count} seeds ± their standard deviation. Another seed has other initial"
        " values and another order of batches. In brackets: 95%, resamples of documents and seeds."
    )
    return Table(header, lines, f"{count} seeds", caption)


def ablation_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Ablations beside the whole model and beside the paper.

    Args:
      found: by name of experiments/ablations, as retro_jax.evaluate.seeds.ablation_figures gives it.
    """
    header = ["ablation", "ON", "against RETRO[ON]"]
    count = max(len(each["differences"][_PAIR]["seeds"]) for each in found.values())
    header += ["of each seed"] * (count > 1) + ["the paper's difference", "same sign?"]
    rows = []
    for name, figures in found.items():
        figure, difference = figures["bits_per_byte"]["ablated"], figures["differences"][_PAIR]
        cells = [name.replace("_", " "), f"{figure['value']:.4f}", interval(difference, "+")]
        if count > 1:
            cells[1] += f" ± {spread(figure):.4f}"
            cells.append(_of_each(difference))
        rows.append([*cells, *_beside_the_paper(name, difference)])
    return Table(header, rows, "Ablations", _OF_SEEDS.format(count) if count > 1 else _OF_ONE)


def _with_spread(figure: Mapping[str, Any]) -> str:
    """The mean of a figure's seeds and their spread; "none" where no chunk is."""
    return "none" if figure["value"] is None else f"{figure['value']:.4f} ± {spread(figure):.4f}"


def _of_each(difference: Mapping[str, Any]) -> str:
    """The difference of each seed."""
    return " ".join("none" if x is None else f"{x:+.4f}" for x in difference["seeds"])


def _beside_the_paper(name: str, difference: Mapping[str, float]) -> tuple[str, str]:
    """The paper's difference, and whether this one has its sign."""
    if name not in published.ABLATIONS:
        return "not in the paper", ""
    theirs = published.ablation_loss(name)
    clear = excludes_zero(difference)
    same = "yes" if (difference["value"] > 0) == (theirs > 0) else "no"
    return f"{theirs:+.3f}", same if clear else "not clear"
