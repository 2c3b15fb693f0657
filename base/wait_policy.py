"""How the threads of OpenMP wait for each other. Import this module before torch.

By default they spin. With another program on a core, each of torch's many short parallel parts then
lasts until the waiting thread has used up its time slice: two threads are several times slower than
one (`docs/performance.md`). OpenMP reads the variable once, when torch is imported.
"""

import os

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # settings of the user stay

if not any(name in os.environ for name in NAMES):
    os.environ["OMP_WAIT_POLICY"] = "passive"
