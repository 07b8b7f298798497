"""Many workers for one cache: `processes` of this machine, or actors of a `ray` cluster.

A `WorkerPool` assigns shards to workers and reassigns those of a dead worker; an engine is a way to run workers
(`Workers`). Each worker opens the dataset and loads the editor itself (`worker`). Only the calling process holds the
cache's lock and writes the manifest, so the cache has the same bytes as one built by a single process.
"""
