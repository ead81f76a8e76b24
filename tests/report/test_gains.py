"""The end of the quickstart: a gain, how sure it is, and what a token memory adds."""

from retro_jax.report.gains import format_gains

BOUNDS = {"baseline": 1.25, "on": 1.0, "baseline+tokens": 0.7, "tokens": 0.71}


def _row(corpus: str, at_most: float, chunks: int, low: float, high: float) -> dict:
    figures = {name: {"value": value} for name, value in BOUNDS.items()}
    difference = {"value": -0.25, "low": low, "high": high}
    return {
        "corpus": corpus,
        "at_most": at_most,
        "chunks": chunks,
        "bits_per_byte": figures,
        "differences": {"on-baseline": difference},
    }


def test_a_gain_is_sure_where_its_interval_leaves_out_0():
    rows = [_row("code", 0.5, 7, -0.4, -0.1), _row("code", 1.0, 9, -0.4, -0.1)]
    rows += [_row("prose", 0.5, 3, -0.5, 0.1), _row("prose", 1.0, 3, -0.5, 0.1)]
    rows += [_row("single", limit, 1, -0.25, -0.25) for limit in (0.5, 1.0)]  # of one document
    rows += [_row("", 0.5, 10, -0.4, -0.1), _row("", 1.0, 12, -0.4, -0.1)]
    title, header, *lines, about, caption = format_gains({"rows": rows}).split("\n")
    assert title == "What retrieval gained" and "RETRO[ON] + tokens" in header
    assert [" ".join(line.split()) for line in lines] == [
        "code 1.2500 1.0000 -20.0% -0.2500 [-0.4000, -0.1000] sure 0.7000 0.7100",
        "code, no long copy 1.2500 1.0000 -20.0% -0.2500 [-0.4000, -0.1000] sure 0.7000 0.7100",
        "prose 1.2500 1.0000 -20.0% -0.2500 [-0.5000, +0.1000] may be chance 0.7000 0.7100",
        "single 1.2500 1.0000 -20.0% -0.2500 [-0.2500, -0.2500] may be chance 0.7000 0.7100",
    ]
    assert "fewer are better" in about and "at most 50%" in caption
    for row in rows:
        del row["bits_per_byte"]["tokens"], row["bits_per_byte"]["baseline+tokens"]
    assert "tokens" not in format_gains({"rows": rows}).split("\n")[1]
