"""The loss before the first update, on random tokens, beside the logarithm of the vocabulary's size.

    python -m benchmarks.first_loss

Prints a table. With a tied read-out the first loss is larger: the final norm gives activations the
length sqrt(width), an embedding has length 1, and most of what a layer's stream holds at the start is
the token's own embedding. So the model begins by repeating the token, with a logit of sqrt(width) at
most.
"""

import dataclasses
import math

import numpy as np
from flax import nnx

from launch.common import app
from retro_jax.batch import RetroBatch
from retro_jax.config import RetroConfig
from retro_jax.model import Retro
from retro_jax.report.tables import Table, as_markdown

WIDTHS, VOCABULARY, CHUNKS = (128, 896), 4096, 1


def main() -> None:
    """Prints the table."""
    rows = []
    for width in WIDTHS:
        config = RetroConfig(
            vocab_size=VOCABULARY,
            d_model=width,
            num_layers=2,
            num_heads=4,
            head_dim=32,
            d_ff=4 * width,
            cca_layers=(2,),
            encoder_d_model=width,
            encoder_num_heads=4,
            encoder_head_dim=32,
            encoder_d_ff=4 * width,
        )
        untied = dataclasses.replace(config, tie_embeddings=False)
        losses = [first_loss(each) for each in (untied, config, config.baseline())]
        rows.append([str(width), f"{math.log(VOCABULARY):.2f}", *(f"{x:.2f}" for x in losses)])
        rows[-1].append(f"{math.sqrt(width):.1f}")
    columns = ["width", "log of vocabulary", "untied", "tied", "tied baseline", "sqrt(width)"]
    print(as_markdown(Table(columns, rows)))


def first_loss(config: RetroConfig) -> float:
    """Mean nats a token of new parameters on random tokens."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.integers(1, config.vocab_size, shape).astype(np.int32)

    tokens = draw(2, CHUNKS * config.chunk_length + 1)
    near = draw(2, CHUNKS, 2, config.neighbour_length) if config.has_retrieval else None
    batch = RetroBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        documents=np.zeros((2, CHUNKS), np.int32),
        corpus=np.zeros(2, np.int32),
        neighbours=near,
    )
    model = Retro(config, rngs=nnx.Rngs(0))
    return float(np.mean(nnx.jit(lambda m, b: m.token_losses(b))(model, batch)))


if __name__ == "__main__":
    app.run(main)
