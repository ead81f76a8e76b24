"""lm-eval's command line with the model `retro` (the extra `lm-eval`); docs/evaluation.md has the command."""

from lm_eval.__main__ import cli_evaluate

from launch.runs.text_generator import Generator
from retro_jax.generate.lm_eval_model import model_class

RetroLM = model_class(Generator.open)

if __name__ == "__main__":
    cli_evaluate()
