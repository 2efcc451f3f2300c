"""Mean absolute value of each input channel: how much AWQ's search takes a channel to matter."""

from __future__ import annotations

from torch import Tensor

from lowbit.stats._mean import mean_of

STATISTIC = mean_of("mean absolute value per channel", Tensor.abs_)
