"""Property tests draw the same examples on every continuous-integration run; elsewhere they go on searching."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
