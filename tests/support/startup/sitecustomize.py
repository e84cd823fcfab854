"""What a Python process that a test has started does first, where PYTHONPATH has this folder: see ../traces.py."""

import os
import sys

if os.environ.get("DITFORGE_TESTS_TRACES"):
    support = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.append(support)
    import traces

    sys.path.remove(support)
    traces.install()
