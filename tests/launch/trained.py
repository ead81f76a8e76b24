"""Entry points run in the test's own process, and the settings of a RETRO of a few steps."""

from launch.common import app

TINY = """
RetroConfig.d_model = 32
RetroConfig.num_layers = 2
RetroConfig.num_heads = 2
RetroConfig.head_dim = 16
RetroConfig.d_ff = 64
RetroConfig.cca_layers = (1, 2)
RetroConfig.encoder_d_model = 16
RetroConfig.encoder_num_layers = 1
RetroConfig.encoder_num_heads = 2
RetroConfig.encoder_head_dim = 8
RetroConfig.encoder_d_ff = 32
BatchConfig.sequence_length = 256
BatchConfig.batch_size = 8
OptimizerConfig.warmup_steps = 2
OptimizerConfig.max_learning_rate = 0.01
TrainConfig.steps = 6
TrainConfig.log_every = 1
TrainConfig.checkpoint_every = 6
"""


def call(main, *arguments: str) -> int:
    """An entry point's exit status, run in this process."""
    return app.execute(main, ["program", *arguments])
