from kimi_nb.train.optim import *  # noqa: F403
