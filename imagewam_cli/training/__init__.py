"""Train an action expert on prefixes that are read from a cache or computed on the fly.

This package imports neither diffusers nor an editor: the caller passes one in.

recipe      every number of a run, as one frozen config
prefixes    the interface of prefix sources, and the source that reads a cache
online      the source that runs an editor, batch by batch
data        rows with their action chunks, normalized, in a seeded order
objective   flow-matching loss and validation figures
run_folder  one writer per run, and starting over
loop        the training run: optimizer, weight average, checkpoints, exact resumption
metrics     JSONL and TensorBoard
"""
