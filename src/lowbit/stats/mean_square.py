"""Mean square of each input channel: the diagonal of the second moment, known as an importance matrix."""

from __future__ import annotations

from torch import Tensor

from lowbit.stats._mean import mean_of

STATISTIC = mean_of("mean square per channel", Tensor.square_)
