"""Flags that more than one of evaluate, sample and report have; absl defines a flag once a process."""

from absl import flags

SPLIT = flags.DEFINE_string("split", "test", "Which split of the documents.")
RETRIEVAL = flags.DEFINE_list(
    "retrieval",
    None,
    "With retrieval on or off; launch.evaluate scores both unless told otherwise.",
)
NUM_NEIGHBOURS = flags.DEFINE_integer(
    "num_neighbours",
    None,
    "Neighbours a chunk; as many as in training unless given.",
    lower_bound=1,
)
