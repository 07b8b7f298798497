"""Training an action expert from a cache. Imports neither diffusers nor an editor.

recipe     every number of a run, as one frozen config
data       cached rows with their action chunks, normalised, in a seeded order
objective  flow-matching loss and validation figures
loop       the run: optimizer, average, checkpoints, exact continuation
metrics    JSONL and TensorBoard
"""
