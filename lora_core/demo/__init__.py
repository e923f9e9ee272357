"""The main job on real text: a small GPT adapted four ways, measured and reported in one run."""
