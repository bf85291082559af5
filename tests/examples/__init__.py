"""Examples and benchmarks find what they share as they do when they are run: in the folder that they lie in.

Here, not in a conftest, so that the processes that `tests.distributed.launch` starts find it, too.
"""

import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]
