from typing import Any

import numpy as np
from numpy.typing import NDArray

def gather(
    chunks: tuple[NDArray[Any], ...], of: NDArray[np.int64], rows: NDArray[np.int64], target: NDArray[Any], /
) -> None: ...
