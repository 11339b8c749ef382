"""What `python -m kermit_hf.quickstart` does, step by step; models need nothing of it."""
