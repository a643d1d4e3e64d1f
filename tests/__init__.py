"""The tests mirror the tree of `cloq`; what several of them share is in `tests.problems`."""
