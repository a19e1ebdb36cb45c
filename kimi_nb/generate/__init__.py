from kimi_nb.use.generate import *  # noqa: F403
