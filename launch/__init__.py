"""The commands of retro-jax: absl entry points, one file each."""
