"""Tools for testing plugins.

`contract` holds `EditorContract`, a pytest class to inherit. `checks` holds the same checks as plain functions, which
`imagewam plugins doctor` runs without pytest. `dataset` holds a dataset in memory.
"""
