"""Import checkpoints of the published ImageWAM code as policy folders.

checkpoint    the weights, read as tensors only
robots        settings that the checkpoint lacks: cameras, normalization, action transforms of LIBERO and RoboTwin
statistics    dataset_stats.json
settings      the settings in train_config.yaml that a policy needs
importing     write all of it to one policy folder
"""
