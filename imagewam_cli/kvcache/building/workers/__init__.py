"""Many workers for one cache: `processes` of this machine, or actors of a `ray` cluster.

A `Crew` gives shards to workers and does again what a dead one leaves; an engine is a way to run workers (`Workers`).
Each worker opens the dataset and loads the editor itself (`worker`). The process that asked holds the cache's lock and
alone writes the manifest: the result is the single build's.
"""
