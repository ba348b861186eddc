import torch

# Networks here are small and tests run side by side (pytest-xdist): several threads
# a process would only wait for each other.
torch.set_num_threads(1)
