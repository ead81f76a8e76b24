"""Flags that more than one entry point has: absl defines a flag once a process."""

from absl import flags

DATA = flags.DEFINE_string("data", None, "Directory of the prepared data. Default: --workdir.")
SPLIT = flags.DEFINE_string("split", "test", "Which split of the documents.")
RETRIEVAL = flags.DEFINE_list(
    "retrieval",
    None,
    "With retrieval on or off; launch.evaluate scores both unless told otherwise, and knows random "
    "and oracle too.",
)
NUM_NEIGHBOURS = flags.DEFINE_integer(
    "num_neighbours",
    None,
    "Neighbours a chunk; as many as in training unless given.",
    lower_bound=1,
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 128, "Tokens of each sample at most.", lower_bound=1
)
AVERAGED = flags.DEFINE_bool(
    "averaged", False, "Use the moving average of the parameters (TrainConfig.average_decay)."
)
