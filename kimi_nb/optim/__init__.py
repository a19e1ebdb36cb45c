from kimi_nb.train.muon import *  # noqa: F403
from kimi_nb.train.optim import *  # noqa: F403
