"""Settings shared by all tests."""

import os

# Tests run side by side, one worker per core, and most of their tensors are too small for threads to pay off. Child
# processes inherit the limit. It has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
