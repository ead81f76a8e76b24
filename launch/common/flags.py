"""Flags that more than one entry point has: absl defines a flag once a process."""

import pathlib

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


def data_directory(place: str | pathlib.Path) -> pathlib.Path:
    """Where prepared data is, as --data or --workdir says.

    Raises:
      flags.Error: it is in a bucket, which launch.train alone reads.
    """
    if "://" in str(place):
        raise flags.Error(f"--data={place}: expected a directory; launch.train alone reads buckets")
    return pathlib.Path(place)
