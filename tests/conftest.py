"""One thread for each worker: the tests run in several processes."""

import torch

torch.set_num_threads(1)
