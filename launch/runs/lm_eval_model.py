"""lm-eval with the model `retro`, a trained run with its database (the extra `lm-eval`).

    python -m launch.runs.lm_eval_model run --model retro --model_args workdir=W --tasks lambada_openai

The rest of the command line is lm-eval's own. docs/evaluation.md has the arguments and what was measured.
"""

from lm_eval.__main__ import cli_evaluate

from launch.runs.text_generator import Generator
from retro_jax.generate.lm_eval_model import model_class

RetroLM = model_class(Generator.open)

if __name__ == "__main__":
    cli_evaluate()
