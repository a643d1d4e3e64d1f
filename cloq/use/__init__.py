"""What is done with a base and its adapter: loaded, checked, merged, looked at, evaluated.

`loading` stands on `several_widths`, `experts_apart` and `frozen`, which make the real libraries read and train bases that they have no
rules for; checking and merging stand on `pairing`. `given` is about a base that someone else quantized.
"""
