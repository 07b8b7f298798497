"""Training an action expert on prefixes, stored or computed as they are needed. Imports neither diffusers nor an
editor: one is handed in.

recipe     every number of a run, as one frozen config
prefixes   where prefixes come from: a cache
online     or an editor, batch by batch
data       rows with their action chunks, normalised, in a seeded order
objective  flow-matching loss and validation figures
loop       the run: optimizer, average, checkpoints, exact continuation
metrics    JSONL and TensorBoard
"""
