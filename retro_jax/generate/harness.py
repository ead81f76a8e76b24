"""The three questions of lm-eval's language-model evaluation harness, asked of a model with its database.

    loglikelihood            (context, continuation) -> nats of the continuation, and whether it is greedy
    loglikelihood_rolling    text -> nats of the whole text
    generate_until           (context, settings) -> text up to a stop string

lm_eval_model.py gives lm-eval a model that answers by this class; nothing here imports lm-eval. Texts
are scored in the windows of launch.evaluate. One that no window sees whole is scored alone, so that no
answer depends on the other requests.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluate.text_scores import TextScores
from retro_jax.generate.live_database import Lookup, Retrieval
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.generate.text_generator import TextGenerator

_AT_ONCE = 64  # requests between two reports
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
_KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", *_SAMPLING)

Report = Callable[[int], object]  # receives how many requests were answered since the last call


def _silent(count: int) -> None:
    """Reports nothing."""


class Harness:
    """Answers requests; each method asks the newest revision of the database as it is then."""

    def __init__(
        self,
        generator: TextGenerator,
        *,
        retrieval: bool | int | Retrieval = True,
        max_tokens: int = 256,
    ) -> None:
        """Takes an opened model.

        Args:
          generator: the model. retrieval: as for `TextGenerator.score`.
          max_tokens: of a continuation whose settings have no length.

        Raises:
          UserError: such a retrieval is not possible.
        """
        self._generator, self._retrieval, self._max_tokens = generator, retrieval, max_tokens
        self._lengths: dict[int, int] = {}
        lookup = generator.lookup(retrieval)
        if lookup is not None and (lookup.stride or lookup.mixture is not None):
            raise UserError("scores with a stride or a token memory: expected launch.evaluate")

    def answers(self, name: str, requests: Sequence[Any], report: Report = _silent) -> list[Any]:
        """The answers to requests of one kind, by the names and in the forms of lm-eval."""
        if name == "loglikelihood":
            return self.log_likelihoods(requests, report)
        if name == "loglikelihood_rolling":
            return self.rolling_log_likelihoods([text for (text,) in requests], report)
        return self.continuations(requests, report)

    def log_likelihoods(
        self, pairs: Sequence[tuple[str, str]], report: Report = _silent
    ) -> list[tuple[float, bool]]:
        """Scores continuations, each after its context.

        The tokens that end within the continuation count; one that begins in the context is among them.

        Args:
          pairs: (context, continuation); either may be empty. report: receives numbers of answers.

        Returns:
          For each the log-probability in nats, and whether each token is the model's most likely one.
        """
        answers = []
        texts = [context + continuation for context, continuation in pairs]
        scored = self._scored(texts, report)
        for (context, continuation), (tokens, scores) in zip(pairs, scored, strict=True):
            first = len(tokens) if not continuation else self._first_after(context, tokens)
            own = slice(first, len(tokens))
            greedy = np.array_equal(scores.likeliest[own, 0], tokens[own])
            answers.append((float(scores.log_probabilities[own].sum(dtype=np.float64)), greedy))
        return answers

    def rolling_log_likelihoods(
        self, texts: Sequence[str], report: Report = _silent
    ) -> list[float]:
        """The log-probability of whole texts in nats, without that of their end."""
        return [
            float(scores.log_probabilities[: len(tokens)].sum(dtype=np.float64))
            for tokens, scores in self._scored(texts, report)
        ]

    def continuations(
        self, requests: Sequence[tuple[str, Mapping[str, Any]]], report: Report = _silent
    ) -> list[str]:
        """Continues contexts, each up to its stop strings, which are no part of the answer.

        Args:
          requests: (context, settings): `until`, `max_gen_toks`, `do_sample`, `temperature` and others as
            lm-eval names them; greedy unless a temperature is given. report: receives numbers of answers.

        Raises:
          UserError: a setting that is not known, or has a value that is not possible; before any text.
        """
        settings = [self._sampling(arguments) for _, arguments in requests]
        answers = [""] * len(requests)
        prompts = [context for context, _ in requests]
        pieces = self._generator.generate(prompts, settings, retrieval=self._retrieval, stream=True)
        for piece in pieces:
            if piece.result is not None:
                answers[piece.index] = piece.result.text
                report(1)
        return answers

    def _sampling(self, arguments: Mapping[str, Any]) -> SamplingConfig:
        """The sampling of a request."""
        unknown = sorted(set(arguments) - set(_KNOWN))
        if unknown:
            raise UserError(
                f"generate_until has the setting {unknown[0]!r}: expected some of {', '.join(_KNOWN)}"
            )
        until = arguments.get("until") or []
        until = [until] if isinstance(until, str) else until
        lengths = [arguments[name] for name in _LENGTHS if arguments.get(name) is not None]
        samples, temperature = arguments.get("do_sample"), arguments.get("temperature")
        if temperature is None:
            temperature = 1.0 if samples else 0.0
        more = {name: arguments[name] for name in _SAMPLING if arguments.get(name) is not None}
        return SamplingConfig(
            max_tokens=int(lengths[0]) if lengths else self._max_tokens,
            temperature=0.0 if samples is False else float(temperature),
            stop=tuple(stop for stop in until if stop),
            **more,
        )

    def _scored(
        self, texts: Sequence[str], report: Report
    ) -> Iterator[tuple[np.ndarray, TextScores]]:
        """The tokens [n] of each text, and scores of these and of eos; texts that are read whole together."""
        generator = self._generator
        lookup = generator.lookup(self._retrieval)
        for start in range(0, len(texts), _AT_ONCE):
            part = [
                np.array([*generator.encode(text), generator.codec.eos_id], np.int32)
                for text in texts[start : start + _AT_ONCE]
            ]
            together = [i for i, tokens in enumerate(part) if len(tokens) <= generator.scorer.whole]
            scores = dict(zip(together, self._score([part[i] for i in together], lookup)))
            for i, tokens in enumerate(part):
                if i not in scores:
                    (scores[i],) = self._score([tokens], lookup)
                yield tokens[1:-1], scores[i]
            report(len(part))

    def _score(self, texts: list[np.ndarray], lookup: Lookup | None) -> list[TextScores]:
        """Scores some texts together."""
        return self._generator.scorer.score(texts, lookup) if texts else []

    def _first_after(self, context: str, tokens: np.ndarray) -> int:
        """The number of the first token of a text that ends after its context."""
        rest = len(context.encode())
        for number, token in enumerate(tokens.tolist()):
            if token not in self._lengths:
                self._lengths[token] = len(self._generator.codec.decode_bytes([token]))
            rest -= self._lengths[token]
            if rest < 0:
                return number
        return len(tokens)
