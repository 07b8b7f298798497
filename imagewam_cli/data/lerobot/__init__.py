"""LeRobot datasets on disk: read v2.0, v2.1 and v3.0 (`reader`), write v3.0 (`writer`).

Built on pyarrow and PyAV, because the `lerobot` package pins versions of torch and diffusers that the editors cannot
use. This module imports nothing, so that the reader and the writer load only what they need.
"""
