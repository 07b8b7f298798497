"""imagewam: turn a pretrained image editor into a robot policy (method: arXiv 2606.19531)."""

__version__ = "0.1.0"
