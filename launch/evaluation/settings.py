"""The settings of an evaluation, as launch.evaluate's flags give them to the functions here."""

import dataclasses
import math

from absl import flags

from retro_jax.evaluate.score import WindowConfig


@dataclasses.dataclass(frozen=True)
class KnnSettings:
    """The settings of kNN-LM, which its results depend on besides the model and the text.

    Attributes:
      tokens: of the training split in its datastore. neighbours: tokens it looks up.
      exact: whether every token of a large datastore is compared.
    """

    tokens: int = 2_000_000
    neighbours: int = 64
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The settings of every condition of an evaluation.

    Attributes:
      window_chunks: chunks of a window; None for the trained length.
      stride_chunks: chunks that windows advance by; None for half a window, or as `overlap` says.
      overlap: share of a window that is context only; None for `stride_chunks`.
      batch_size: windows at once.
      max_documents: only the first so many documents of each corpus; None for all.
      knn: how kNN-LM is scored.
      sample_chunks: how many random chunks are scored; None for all.
    """

    window_chunks: int | None = None
    stride_chunks: int | None = None
    overlap: float | None = None
    batch_size: int = 8
    max_documents: int | None = None
    knn: KnnSettings = KnnSettings()
    sample_chunks: int | None = None

    def windows(self, trained_chunks: int) -> WindowConfig:
        """Windows of a model that was trained on sequences of so many chunks.

        Raises:
          flags.Error: they do not overlap by whole chunks, or leave chunks out.
        """
        chunks = self.window_chunks or trained_chunks
        stride = self.stride_chunks or max(1, chunks // 2)
        if self.overlap is not None:
            stride = round(chunks * (1 - self.overlap))
            if not stride or not math.isclose(stride, chunks * (1 - self.overlap)):
                raise flags.Error(
                    f"--overlap={self.overlap:g}: expected a share of {chunks} chunks, the window, "
                    "that is a whole number and not all"
                )
        if stride > chunks:
            raise flags.Error(f"--stride_chunks={stride}: expected at most {chunks}, the window")
        return WindowConfig(chunks=chunks, stride=stride, batch_size=self.batch_size)
