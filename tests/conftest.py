"""For the whole suite: graphs are verified after every pass; one thread for each worker, since several run at once."""

import torch

from flowlang.ir.check import Checks

Checks.on = True
torch.set_num_threads(1)
