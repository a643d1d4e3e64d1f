"""The parts of `torture.py`, which is run as a script and never imported by cloq.

bench    a tiny model, a text and an undisturbed run, made on the spot      trial    one command in a process of its own, and its verdict
damage   bytes → damaged bytes                                              faults   what goes wrong around a run
fuzz     what can be wrong in what a run reads
"""
