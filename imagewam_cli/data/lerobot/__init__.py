"""LeRobot datasets on disk: read v2.1 and v3.0 (`reader`), write v3.0 (`writer`).

Ours, on pyarrow and PyAV, because the `lerobot` package pins versions of torch and diffusers that the editors cannot
use. Nothing is imported here: the reader and the writer each load only what they need.
"""
