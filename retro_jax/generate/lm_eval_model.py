"""The model class that lm-eval asks; its answers are those of harness.py. Imports the package lm_eval."""

from collections.abc import Callable
from typing import Any

import tqdm
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from retro_jax.generate.harness import Harness
from retro_jax.generate.text_generator import TextGenerator

NAME = "retro"
_OF_EVERY_MODEL = ("batch_size", "max_batch_size", "device")  # that say nothing to this one


def model_class(open_generator: Callable[..., TextGenerator]) -> type[LM]:
    """The class, registered with lm-eval as `retro`.

    Args:
      open_generator: opens a workdir.
    """

    @register_model(NAME)
    class RetroLM(LM):
        """A trained run with its database.

        Args:
          workdir: W. retrieval: True as in training, False for none, or neighbours of a chunk.
          max_gen_toks: of a continuation whose task does not say. opened: for `open_generator`.
        """

        def __init__(
            self, workdir: str, retrieval: bool | int = True, max_gen_toks: int = 256, **opened: Any
        ) -> None:
            super().__init__()
            more = {name: opened[name] for name in opened if name not in _OF_EVERY_MODEL}
            generator = open_generator(workdir, **more)
            self._harness = Harness(generator, retrieval=retrieval, max_tokens=max_gen_toks)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            """For each (context, continuation): its nats, and whether it is greedy."""
            return self._answers("loglikelihood", requests, disable_tqdm)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[Any]:
            """For each (text,): its nats."""
            return self._answers("loglikelihood_rolling", requests, disable_tqdm)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            """For each (context, settings): its continuation."""
            return self._answers("generate_until", requests, disable_tqdm)

        def _answers(self, name: str, requests: list[Any], quiet: bool) -> list[Any]:
            """The answers, and a progress bar."""
            with tqdm.tqdm(total=len(requests), desc=name, disable=quiet) as bar:
                return self._harness.answers(name, [each.args for each in requests], bar.update)

    return RetroLM
