"""Checkpoints of the published ImageWAM code, made into policy folders like any other.

checkpoint    the file of weights, read as tensors and nothing else
robots        what the file does not say: cameras, normalisation, grippers of LIBERO and RoboTwin
statistics    dataset_stats.json
settings      train_config.yaml, as far as a policy needs it
importing     all of it into one folder
"""
