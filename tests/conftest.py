"""One thread a process: the matrices of the tests are small, and several workers run side by side."""

import torch

torch.set_num_threads(1)
