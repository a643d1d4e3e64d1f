"""The parts of `bench_quality.py`, which is run as a script and never imported by cloq.

protocol   what is the same for all cells, and what a sweep changes of it      methods   bases and factors by name
cells      one training run: its name, and its result as it is kept            starts    the bases and factors themselves
rivals     those that other libraries make                                     training  one cell, from its start
answers    accuracy on tasks                                                   summary   cells → rows, all statistics (no torch)
tables     rows → Markdown                                                     figures   rows → pictures
"""
