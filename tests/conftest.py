import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Tiny models gain nothing from threads and lose much where cores are shared.
torch.set_num_threads(1)
