"""A run: block after block, each loaded, captured, solved, stored and freed. `pipeline` is the loop.

Decided before it: `device`, `layers`, `manifest`, `fisher`, `survey`, `budget`. What it is made of: `capture`, `solve`. What it stands on:
`store` and `checksum` (finished blocks on disk), `memory`, `distributed`.
"""
