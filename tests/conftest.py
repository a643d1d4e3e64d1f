"""For all tests: what continuous integration and several test processes need."""

import os

from hypothesis import settings

# Property tests draw the same examples on every continuous-integration run; elsewhere they go on searching.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:  # test processes side by side have a core each; so have the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
