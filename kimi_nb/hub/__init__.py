from kimi_nb.use.hub import *  # noqa: F403
