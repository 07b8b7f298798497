"""Run exported policies. Nothing here imports torch or other parts of imagewam."""
