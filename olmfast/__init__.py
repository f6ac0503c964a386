"""olmfast: the best merge a pool of fine-tuned language models holds, found by evaluation on one GPU."""

__version__ = "0.1.0"
