"""Which of many chunks or keys are looked at where all would take too long."""

import numpy as np


def sample_ids(total: int, sample: int, seed: int = 0) -> np.ndarray:
    """Some of range(total), in order; the same ones each time."""
    random = np.random.Generator(np.random.Philox(seed))
    return np.sort(random.choice(total, min(sample, total), replace=False))
