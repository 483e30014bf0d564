"""Models scored through lm-eval, our own offline tasks, and the tasks' verifiers.

lm-eval reaches data sets through the Hugging Face hub. Nothing here needs a network, so the hub is switched off
before any of its libraries is imported; set HF_HUB_OFFLINE=0 to let a task of your own download its data.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
