"""What `python -m nystromformer_hf.quickstart` does, step by step; models need nothing of it."""
