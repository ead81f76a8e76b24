"""The parts of launch.evaluate."""
