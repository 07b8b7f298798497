"""What authors of plugins test theirs with.

`contract`: `EditorContract`, a pytest class to inherit. `checks`: the same promises as plain functions, which
`imagewam plugins doctor` runs without pytest. `dataset`: a dataset in memory.
"""
