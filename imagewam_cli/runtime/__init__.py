"""What runs an exported policy. Nothing here imports torch or the rest of imagewam."""
